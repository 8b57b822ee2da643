"""The device and the memory beside it: choosing, copying, checking, capturing."""
