"""Files of torch.save, read without torch: a zip file with a pickle and storages. Nothing in them is executed."""
