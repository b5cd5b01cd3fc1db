#!/usr/bin/env bash
# n8n.sh: makes the role that n8n works with. The image of PostgreSQL runs it once, when it has made an empty database, as the superuser.
#
# The role owns the schema `public` of the database n8n, which n8n's migrations fill, and nothing else: it is no superuser, and can make
# neither databases nor roles nor extensions. It may not even connect to the other databases.
set -euo pipefail

# The password goes in as a variable, so that no character of it is SQL, and by the environment, so that no list of processes shows it.
psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" <<'SQL'
\getenv password N8N_DB_PASSWORD
\if :{?password}
\else
    \warn 'N8N_DB_PASSWORD is not set'
    DO $$ BEGIN RAISE 'N8N_DB_PASSWORD is not set'; END $$;
\endif
CREATE ROLE n8n LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD :'password';
REVOKE ALL ON DATABASE n8n, postgres, template1 FROM PUBLIC;
GRANT CONNECT, TEMPORARY ON DATABASE n8n TO n8n;
ALTER SCHEMA public OWNER TO n8n;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
-- n8n asks for it at every start, and would warn that it may not make it.
CREATE EXTENSION IF NOT EXISTS "uuid-ossp" WITH SCHEMA public;
SQL
