#!/bin/sh
# One machine or two, which may fail, go and come back, on each: ./elastic.sh FIRST_MACHINE [processes on each]
# Exit code: 0 when the run is complete, 75 when it was preempted (start this again), 1 when it has failed.

# Without it, a machine that joins cannot meet the others
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

torchrun --nnodes 1:2 --nproc-per-node "${2:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id several --rdzv-endpoint "$1:29400" train.py &
trap 'kill -TERM $!' TERM INT
wait $!
code=$?
# A signal has ended the wait
[ "$code" -le 128 ] || { wait $!; code=$?; }

# The code of torchrun is 1 in both cases
if [ "$code" != 0 ] && grep -q '"preempted": true' runs/several/run.json; then
    code=75
fi
exit "$code"
