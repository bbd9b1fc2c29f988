"""What all tests outside ``horovod_torch`` share."""

#: Run by every rank of a Horovod job, which ``test_horovod_torch.py`` starts.
collect_ignore = ["horovod_torch"]
