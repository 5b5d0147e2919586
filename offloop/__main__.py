"""`python -m offloop`: the same as the command `offloop`."""

from offloop.cli.main import app

if __name__ == "__main__":
    app(prog_name="python -m offloop")
