"""Every field of vLLM's `EngineArgs`, and what DWDP makes of it.

A contract test fails with the name of a field that is in no class or has gone, so that no new flag of
vLLM slips past the refusals. The classes:

supported
    a test runs it with DWDP, or it is of a part of vLLM that never meets an expert.
refused
    see `refusals`.
irrelevant
    without effect here: it tunes something that is refused or belongs to other devices.
untested
    handed on to vLLM as it is. It might meet experts, and nothing of ours has run it.
"""

from vllm_dwdp.compat.frontend.refusals import REFUSED, REFUSED_VALUES

_SUPPORTED = {
    "run by the tests": """
        model served_model_name seed max_model_len enforce_eager additional_config
        distributed_executor_backend tensor_parallel_size data_parallel_size data_parallel_size_local
        data_parallel_rank data_parallel_start_rank data_parallel_hybrid_lb
        data_parallel_external_lb data_parallel_backend _api_process_count _api_process_rank
        enable_prefix_caching enable_chunked_prefill max_num_batched_tokens max_num_seqs
        gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override disable_log_stats
        enable_lora max_loras max_lora_rank speculative_config dtype kv_cache_dtype hf_overrides
        safetensors_load_strategy model_loader_extra_config worker_extension_cls profiler_config
        enable_prompt_embeds kv_sharing_fast_prefill model_impl runner convert trust_remote_code
        limit_mm_per_prompt mm_processor_kwargs mm_processor_cache_type kv_events_config
        kv_transfer_config data_parallel_multi_port_external_lb shutdown_timeout
    """,
    "names the model's files; ranks compare what they found": """
        revision code_revision hf_token download_dir ignore_patterns use_tqdm_on_load
    """,
    "tokens, prompts and answers: front end only": """
        tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init tokens_only
        allowed_local_media_path allowed_media_domains renderer_num_workers io_processor_plugin
        generation_config override_generation_config reasoning_parser reasoning_parser_plugin
        stream_interval max_num_queued_reqs max_num_queued_tokens
    """,
    "sampling: after the last layer": """
        max_logprobs logprobs_mode use_fp64_gumbel logits_processors structured_outputs_config
        reasoning_config
    """,
    "the scheduler and the blocks of the KV cache: before the first layer": """
        block_size prefix_caching_hash_algo prefix_cache_retention_interval prefix_match_unit
        max_num_scheduled_tokens max_num_active_seqs long_prefill_token_threshold
        long_prefill_token_threshold_adaptive scheduling_policy scheduler_reserve_full_isl watermark
        disable_chunked_mm_input
    """,
    "logs, metrics and traces of the front end and the scheduler": """
        aggregate_engine_logging show_hidden_metrics_for_version otlp_traces_endpoint
        per_request_spec_decode_metrics kv_cache_metrics kv_cache_metrics_sample
        custom_histogram_buckets enable_logging_iteration_details enable_mm_processor_stats
        logging_config log_level log_config_file fail_on_environ_validation
    """,
}

_IRRELEVANT = {
    "tunes pipeline or context parallelism, Ray's workers, or a rank over several hosts": """
        dcp_comm_backend dcp_q_replicate dcp_kv_cache_interleave_size cp_kv_cache_interleave_size
        enable_hc_sp ray_workers_use_nsight master_addr master_port node_rank
    """,
    "tunes expert parallelism": """
        enable_ep_weight_filter all2all_backend eplb_config expert_placement_strategy
        elastic_ep_max_dp_size
    """,
    "tunes ranks that wait for each other": """
        dp_sync_interval disable_nccl_for_dp_synchronization fault_tolerance_config
        dbo_decode_token_threshold dbo_prefill_token_threshold
    """,
    "tunes offloading": """
        offload_backend cpu_offload_params offload_num_in_group offload_prefetch_step offload_params
    """,
}

_UNTESTED = {
    "kernels, graphs and formats of the experts themselves": """
        quantization quantization_config allow_deprecated_quantization moe_backend linear_backend
        kernel_config ir_op_priority compilation_config cudagraph_capture_sizes
        max_cudagraph_capture_size optimization_level performance_mode enable_flashinfer_autotune
        jit_monitor_mode jit_monitor_verbose cudagraph_metrics async_scheduling
        enable_cumem_allocator
    """,
    "sleep mode, which vLLM has on GPUs only": """
        enable_sleep_mode sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names
        enable_nccl_comm_suspend
    """,
    "models built or read in other ways": """
        model_class_overrides model_weights hf_config_path config_format
        safetensors_prefetch_num_threads safetensors_prefetch_block_size pt_load_map_location
        scheduler_cls engram_config diffusion_config
    """,
    "several models, or other uses of one": """
        spec_method spec_model spec_tokens pooler_config
    """,
    "tunes tensor parallelism": """
        enable_batch_sharded_sampling disable_custom_all_reduce max_parallel_loading_workers
        distributed_timeout_seconds cpu_distributed_timeout_seconds
    """,
    "adapters of other kinds": """
        default_mm_loras fully_sharded_loras max_cpu_loras lora_dtype lora_target_modules
        enable_tower_connector_lora specialize_active_lora enable_mixed_moe_lora_format
        enable_moe_shared_loras max_lora_cls_labels
    """,
    "looks into layers or steps": """
        enable_return_routed_experts return_sampling_mask aux_output_config enable_trace_replay
        watermark_config collect_detailed_traces enable_layerwise_nvtx_tracing enable_mfu_metrics
    """,
    "attention and state-space layers": """
        attention_config attention_backend kv_cache_dtype_skip_layers
        disable_sliding_window disable_cascade_attn disable_hybrid_kv_cache_manager
        sparse_indexer_topk_backend swa_bounded_replay mamba_config
        mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode
        enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm mamba_backend
        mamba_ssu_algorithm enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds
        gdn_prefill_backend kda_prefill_backend kda_decode_backend
    """,
    "images, video and sound": """
        language_model_only enable_mm_embeds interleave_mm_strings
        media_io_kwargs mm_processor_cache_gb
        mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_tp_mode
        mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
        mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin skip_mm_profiling
        video_pruning_rate video_pruning_method mm_tensor_ipc mm_processor_device
        mm_ipc_gpu_memory_gb mm_device_do_normalize enable_shm_tensor_arena
    """,
    "KV and encoder caches that leave the engine": """
        ec_transfer_config ec_manager_config kv_offloading_size
        kv_offloading_backend
    """,
    "where a rank computes, how it is reached and how it ends": """
        data_parallel_address data_parallel_rpc_port
        device_ids numa_bind numa_bind_nodes numa_bind_cpus prefill_schedule_interval
        watchdog_config
    """,
}


SINCE = {"monokernel": (0, 33), "sleep_mode_backend": (0, 33), "watchdog_config": (0, 33)}
"""Fields that older versions of the range do not have, and the first that has each."""


def _names(classes: dict[str, str]) -> dict[str, str]:
    """Each name with the reason for its class."""
    return {name: reason for reason, names in classes.items() for name in names.split()}


FIELDS: dict[str, dict[str, str]] = {
    "supported": _names(_SUPPORTED),
    "refused": {field: reason for field, _, _, reason in REFUSED} | REFUSED_VALUES,
    "irrelevant": _names(_IRRELEVANT),
    "untested": _names(_UNTESTED),
}
"""The names of each class, with the reason."""
