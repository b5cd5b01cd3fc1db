"""Against a real n8n: `make test-n8n` installs one and runs these; `make test` leaves them out."""
