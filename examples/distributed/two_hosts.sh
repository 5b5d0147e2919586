#!/bin/sh
# Two machines with a common directory, on both: ./two_hosts.sh FIRST_MACHINE [processes on each]
exec torchrun --nnodes 2 --nproc-per-node "${2:-1}" \
    --rdzv-backend c10d --rdzv-id several --rdzv-endpoint "$1:29400" train.py
