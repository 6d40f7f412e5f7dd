"""The command `vllm-dwdp`."""

import sys

import typer

import vllm_dwdp
from vllm_dwdp.entrypoints.cli.bench import bench, calibrate
from vllm_dwdp.entrypoints.cli.doctor import doctor
from vllm_dwdp.entrypoints.cli.launch import launch
from vllm_dwdp.entrypoints.cli.paper import paper
from vllm_dwdp.entrypoints.cli.plan import plan
from vllm_dwdp.entrypoints.cli.simulate import simulate
from vllm_dwdp.entrypoints.cli.status import status
from vllm_dwdp.entrypoints.tables import say
from vllm_dwdp.errors import DwdpError

app = typer.Typer(
    help="Tools around vLLM's dwdp backend.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.command()
def version() -> None:
    """Print the version."""
    say(vllm_dwdp.__version__)


for command in (plan, simulate, paper, bench, calibrate, status, doctor):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(launch)


def main() -> None:
    """Run the command; what we refuse is one line and exit status 2."""
    try:
        app()
    except DwdpError as error:
        print(f"vllm-dwdp: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
