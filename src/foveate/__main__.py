"""`foveate` and `python -m foveate`."""


def run() -> None:
    """The command line; Ctrl-C ends it without a traceback from the first moment on."""
    try:
        from foveate.commands.app import app

        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    run()
