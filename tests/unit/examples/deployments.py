"""The deployment examples, and what the programs in them are given."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.compose import load

DEPLOY = Path(__file__).parents[3] / "examples" / "deploy"


COMPOSE = ("compose", "compose.disaggregated")


KUBERNETES = ("kubernetes", "kubernetes.disaggregated")


LLM_D = "llm-d-values"


KUBERNETES_VERSION = "1.31"


SETTINGS = {"IMAGE": "image", "MODEL": "/models/model"}


def compose(name: str) -> dict[str, Any]:
    return load(DEPLOY / f"{name}.yaml", SETTINGS)


def documents(name: str, kind: str) -> list[dict[str, Any]]:
    """Return the objects of a kind in a file for Kubernetes."""
    every = yaml.safe_load_all((DEPLOY / f"{name}.yaml").read_text())
    return [each for each in every if each["kind"] == kind]


def pods(name: str) -> list[dict[str, Any]]:
    """Every kind of pod in a file, the ranks' first."""
    if name == LLM_D:
        values = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())
        made = []
        for role in ("prefill", "decode"):
            pod = {key: value for key, value in values[role].items() if key != "extraConfig"}
            pod["containers"] = [
                container | container["extraConfig"] for container in pod["containers"]
            ]
            made.append(pod | values[role].get("extraConfig", {}))
        return made
    owners = documents(name, "StatefulSet") + documents(name, "Deployment")
    return [owner["spec"]["template"]["spec"] for owner in owners]


def arguments(folder: Path, command: str, **environment: str) -> list[str]:
    """Return what a shell command gives to the program that it becomes, the program's name first."""
    for name in ("vllm", "vllm-router", "python3"):
        program = folder / name
        program.write_text('#!/bin/sh\nprintf \'%s\\0\' "${0##*/}" "$@"\n')
        program.chmod(0o755)
    found = subprocess.run(
        ["/bin/sh", "-c", command],
        env={"PATH": f"{folder}:/usr/bin:/bin"} | environment,
        capture_output=True,
        check=True,
    )
    return found.stdout.decode().split("\0")[:-1]


def compose_ranks(folder: Path, name: str) -> list[list[str]]:
    services = [
        each for each in compose(name)["services"].values() if "RANK" in each["environment"]
    ]
    return [arguments(folder, each["command"][0], **each["environment"]) for each in services]


def pod_ranks(folder: Path, name: str) -> list[list[str]]:
    (container,) = pods(name)[0]["containers"]
    command = container["args"][0]
    if name == LLM_D:
        command = command.replace("/run/vllm-dwdp/prefill/rank", f"{folder}/rank")
        return [arguments(folder, command)]
    hosts = (f"{documents(name, 'StatefulSet')[0]['metadata']['name']}-{rank}" for rank in (0, 1))
    return [arguments(folder, command, HOSTNAME=host) for host in hosts]


def systemd_ranks(folder: Path, name: str) -> list[list[str]]:
    unit = (DEPLOY / f"{name}.service").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ExecStart=/bin/sh -c '(.*)'$", unit, re.MULTILINE)
    command = line.replace('\\\\"', '\\"').replace("%i", "1")
    return [arguments(folder, command, MODEL="/models/model", RANKS="2")]


def value(words: list[str], option: str) -> str:
    (at,) = (number for number, word in enumerate(words) if word == option)
    return words[at + 1]


def options_of(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = json.loads(value(words, "--additional-config"))["dwdp"]
    return options


def rendezvous_of(words: list[str]) -> Path:
    return Path(options_of(words)["rendezvous"].removeprefix("unix://"))


def mounted_at(mounts: list[dict[str, Any]], folder: Path) -> str:
    """Return the volume that holds a folder."""
    (name,) = (mount["name"] for mount in mounts if folder.is_relative_to(mount["mountPath"]))
    return str(name)


def is_a_server(container: dict[str, Any]) -> bool:
    return "ports" in container
