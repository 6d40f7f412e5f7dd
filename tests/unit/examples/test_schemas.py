"""Compose files and objects for Kubernetes follow their schemas."""

import subprocess

import pytest

from tests.unit.examples.deployments import COMPOSE, DEPLOY, KUBERNETES, KUBERNETES_VERSION


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_follow_their_schema(name: str, schemas: str) -> None:
    program = [schemas, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run(
        [*program, str(DEPLOY / f"{name}.yaml")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", KUBERNETES)
def test_objects_for_kubernetes_follow_their_schemas(name: str, schemas: str) -> None:
    code = f"""if 1:
        import kubernetes_validate, sys, yaml
        for each in yaml.safe_load_all(open(sys.argv[1])):
            kubernetes_validate.validate(each, {KUBERNETES_VERSION!r}, strict=True)
    """
    checked = subprocess.run(
        [schemas, "-c", code, str(DEPLOY / f"{name}.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
