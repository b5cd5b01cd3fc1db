"""TLS as the service speaks it to its Redis. Connects to nothing."""

from __future__ import annotations

import ssl

from aistream.config import Config
from aistream.errors import ConfigError


def context(config: Config) -> ssl.SSLContext:
    """Demands a certificate from the configured authorities, with the name that Redis is asked for by; shows the configured one.

    Raises ConfigError that names the setting whose file cannot be used.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    name, expected = "REDIS_CA_FILE", "a file with certificate authorities (PEM)"
    try:
        if config.redis_ca_file:
            made.load_verify_locations(config.redis_ca_file)  # and no others: not the system's
        else:
            made.load_default_certs()
        if config.redis_cert_file:
            name, expected = "REDIS_CERT_FILE", "a certificate (PEM), with its private key in it or in REDIS_KEY_FILE"
            # Without a word a key with a passphrase would ask for it on the terminal.
            made.load_cert_chain(config.redis_cert_file, config.redis_key_file or None, password="")  # nosec B106
    except OSError as error:  # of which ssl.SSLError is one
        said = error.reason if isinstance(error, ssl.SSLError) and error.reason else error.strerror or "it has another form"
        raise ConfigError([f"{name} cannot be used ({said}): expected {expected}"]) from error
    return made
