"""What several unit tests share."""

import pytest

from tests.helpers.environments import Unavailable, environment

SCHEMAS = ("check-jsonschema==0.39.0", "kubernetes-validate==1.37.0")


@pytest.fixture(scope="session")
def schemas(request: pytest.FixtureRequest) -> str:
    """Return a Python with the schemas of Compose, Kubernetes and GitHub, from PyPI."""
    folder = request.config.cache.mkdir("schemas-" + "-".join(SCHEMAS).replace("=", ""))
    try:
        return str(environment(folder, *SCHEMAS))
    except Unavailable as reason:
        pytest.skip(str(reason))
