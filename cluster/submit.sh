#!/usr/bin/env bash
# Extraction as a job of a Ray cluster that is running already.
#
#     cluster/submit.sh http://HEAD:8265 laion --out s3://bucket/laion --estimators open
#
# The project must be installed on the cluster's nodes (cluster/Dockerfile makes such an image). The job goes on when
# this terminal is closed; `ray job logs`, `ray job stop` and, to continue, this same command work on it. Of a cluster
# that asks for a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN must be set here as they were for `ray start`.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: cluster/submit.sh DASHBOARD DATA --out URL [options of python -m extract]" >&2
    exit 2
fi
dashboard=$1
shift
exec ray job submit --address "$dashboard" --no-wait -- python -m extract "$@" --address auto
