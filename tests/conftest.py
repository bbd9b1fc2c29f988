"""What all tests share that run in one process."""

#: Run by every rank of a Horovod job, which ``test_horovod_torch.py`` and ``test_horovod_tensorflow.py`` start.
collect_ignore = ["horovod_torch", "horovod_tensorflow"]
