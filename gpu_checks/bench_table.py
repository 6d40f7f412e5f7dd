"""The tables of `gpu_checks.bench`, and the promises that its rows must keep."""

from typing import Any

from gpu_checks.bench_cases import MODES, NUM_LAYERS

PROMISED_RATIO = 1.03
TIMES = ("layer ms", "moe ms", "fill ms")
RATIOS = {
    "eager": "prefetch eager",
    "piece": "prefetch piecewise",
    "full": "prefetch full",
    "merge": "merge piecewise",
    "join": "join piecewise",
    "gather": "gather full",
}


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Print steps, copies and the host's time, and what issuing copies costs the host."""
    print_steps(rows)
    print_issue_times(rows)


def print_steps(rows: list[dict[str, Any]]) -> None:
    """Print step times, as ratios to resident weights in the same mode."""
    print("\nstep time over that of resident weights in the same mode (prefetch unless named)")
    print("* : a layer computes longer than its copy takes, so that prefetch promises <= 1.03")
    heading = f"{'case':<26}{'tokens':>7}" + "".join(f"{name:>9}" for name in (*TIMES, *RATIOS))
    print(heading + f"{'eager/full':>11}  same bits")
    for row in rows:
        layer_ms = row["ms"]["resident piecewise"]["median"] / NUM_LAYERS
        fill_ms = row["copies"]["fill_ms"]
        cells = [f"{layer_ms:.2f}", f"{row['moe_ms']:.2f}", f"{fill_ms:.2f}"]
        for name in RATIOS.values():
            cells.append(f"{row['ratios'][name]:.3f}" if name in row["ratios"] else "-")
        graphs = row["ms"]["prefetch eager"]["median"] / row["ms"]["prefetch full"]["median"]
        mark = "*" if layer_ms > fill_ms else " "
        print(
            f"{row['case']:<25}{mark}{row['tokens']:>7}"
            + "".join(f"{cell:>9}" for cell in cells)
            + f"{graphs:>11.2f}  {'yes' if all(row['same'].values()) else 'NO'}"
        )
    print(f"\n{'copies and host':<26}{'fill GB/s':>10}{'plain':>8}{'ratio':>7}{'in place':>9}"
          f"{'wait+record us':>15}{'+ per replay us':>16}")  # fmt: skip
    for row in {row["case"]: row for row in rows}.values():
        copies, host = row["copies"], row["host_us"]
        print(
            f"{row['case']:<26}{copies['fill_gbps']:>10.0f}{copies['plain_gbps']:>8.0f}"
            f"{copies['ratio']:>7.2f}{copies['read_gbps']:>9.0f}"
            f"{host['wait_and_record']:>15.1f}{host['added_to_a_replay']:>16.1f}"
        )
    if rows:
        print(f"\n{rows[0]['device']}")
        for how in sorted({row["copies"]["how"] for row in rows}):
            print(f"copies: {how}")
        for kernel in sorted({row["kernel"] for row in rows}):
            print(f"kernel: {kernel}")
    print(
        "Without `host`: peers are on the same GPU, copies run on its multiprocessors and share its\n"
        "memory's bandwidth. `host`: a copy engine reads pinned memory over PCIe (gpu_checks/bench.py)."
    )


def print_issue_times(rows: list[dict[str, Any]]) -> None:
    """Print what a layer's copies cost the host to enqueue."""
    print(f"\n{'issue of one layer':<26}{'slices':>13}{'us':>8}{'us per slice':>14}")
    for row in {row["case"]: row for row in rows}.values():
        us, slices = row["host_us"]["issue"], row["host_us"]["slices"]
        print(f"{row['case']:<26}{slices:>13}{us:>8.1f}{us / max(1, slices):>14.2f}")


def broken_promises(rows: list[dict[str, Any]]) -> list[str]:
    """Say where a real copy engine had time enough and a step still took longer than promised."""
    broken = []
    for row in rows:
        if not all(row["same"].values()):
            broken.append(
                f"{row['case']}, {row['tokens']} tokens: other bits than resident weights"
            )
        if row["device"].startswith("NOT A GPU"):
            continue
        enough = row["ms"]["resident piecewise"]["median"] / NUM_LAYERS > row["copies"]["fill_ms"]
        if row["case"].endswith("host") and enough:
            for mode in MODES:
                ratio = row["ratios"][f"prefetch {mode}"]
                if ratio > PROMISED_RATIO:
                    broken.append(
                        f"{row['case']}, {row['tokens']} tokens, {mode}: {ratio:.3f} > "
                        f"{PROMISED_RATIO}"
                    )
    return broken
