"""``vlm4vla serve``."""

import click

from vlm4vla.verbs.shared import backbone_option, device_option, threads_option


@click.command()
@click.argument("policy")
@click.option(
    "--listen", multiple=True, metavar="DIALECT=PORT", help="Repeatable. [default: openpi, vla-eval, starvla]"
)
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: every network; set a token then.")
@click.option("--token", envvar="VLM4VLA_TOKEN", help="What clients must show; better by the variable VLM4VLA_TOKEN.")
@click.option("--form", help="How clients that do not say it get actions; without it they get none (docs/serving.md).")
@click.option(
    "--resize", default="refuse", show_default=True, help="What to do with pictures of another size: bicubic, ..."
)
@click.option("--execute", type=click.IntRange(min=1), help="Actions of each chunk that vla-eval gets. [default: all]")
@click.option("--max-batch", type=click.IntRange(1, 1024), default=16, show_default=True)
@click.option(
    "--max-wait-ms",
    type=click.FloatRange(0, 1000),
    default=0,
    show_default=True,
    help="How long an idle policy waits for a full batch.",
)
@click.option("--max-message-mb", type=click.IntRange(1, 1024), default=16, show_default=True)
@backbone_option
@device_option
@threads_option
def serve(
    policy: str,
    listen: tuple[str, ...],
    host: str,
    token: str | None,
    form: str | None,
    resize: str,
    execute: int | None,
    max_batch: int,
    max_wait_ms: float,
    max_message_mb: int,
    backbone: str | None,
    device: str,
    threads: int,
) -> None:
    """Serve POLICY, a folder or hub:OWNER/NAME, to clients of openpi, vla-eval and StarVLA until Ctrl-C."""
    from vlm4vla.serving.server import MEBIBYTE, Settings, listening, serve_forever
    from vlm4vla.serving.service import Service
    from vlm4vla.serving.sources import checkpoint

    settings = Settings(host, listening(listen), token, max_batch, max_wait_ms / 1000, max_message_mb * MEBIBYTE)
    source = checkpoint(policy, device, threads, backbone)
    serve_forever(Service(source, resize, form, execute or 0), settings, click.echo)
