"""Prints a token that n8n could have signed; `aistream token` by its old name."""

from aistream.cli.token import token

if __name__ == "__main__":
    token()
