"""Drives with a model: pictures and poses of this moment in, paths out; films and closed loops made of that."""
