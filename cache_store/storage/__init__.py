"""Places where objects lie: a local file system or S3-compatible object storage, behind one protocol."""
