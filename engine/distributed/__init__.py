"""Several processes ("ranks") that train one run together, on torch.distributed. Nothing else knows of them.

Who is there
    launch            who started this process, as which rank
    rendezvous        the store through which ranks exchange what is rare or slow; once in a process
    group             the process group: collectives, in the training thread alone
    sockets           what forked children must close
    signs_of_life     who has failed, hangs or cannot be reached

Decisions
    plan              rank 0's decisions before the run, and whether all ranks were started alike
    splits            a split without a seed is rank 0's on all ranks
    agreement         commands, numbers of steps, time: one collective at some step boundaries
    messages          what ranks tell each other in it
    news              commands inside a validation, through the store
    rank_mailbox      the loop's mailbox, which gets what all ranks apply
    following         what a decider or a `call` changes on rank 0, the others change too

Data
    shares            each rank's share of the batches
    twins             loaders and samplers that give one rank's share
    own_batches       what each rank's own loader gives, and that all have as many
    shared_order      the order of samples, drawn from rank 0's random state

Strategies, each based on the one before
    group_strategy    of a loop that only validates
    rank_strategy     of a loop that trains, without its gradients
    ddp               `DistributedDataParallel`

What uses them
    rank_run          one run, from the store to the goodbye
    rank_log          `ranks/<rank>/log.txt`; in the terminal, rank 0 speaks
    together          evaluations and predictions
"""
