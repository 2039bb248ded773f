#!/usr/bin/env bash
# Runs the program of this name.
exec python3 "${0%.sh}.py" "$@"
