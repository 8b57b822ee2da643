"""The device and the host memory beside it: choosing, copying, checking, capturing."""
