"""`python -m aistream`, and the console script: the command line, in a process that is patched as the workers are."""

from gevent import monkey

monkey.patch_all()

from aistream.cli import main

if __name__ == "__main__":
    main(prog_name="aistream")
