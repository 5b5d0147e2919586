#!/bin/sh
# One machine: ./one_host.sh [processes]
exec torchrun --standalone --nproc-per-node "${1:-2}" train.py
