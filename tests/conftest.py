"""What all tests share that run in one process."""

#: Run by processes of their own, which ``test_horovod_torch.py`` and others start.
collect_ignore = ["horovod_torch", "horovod_tensorflow", "triton"]
