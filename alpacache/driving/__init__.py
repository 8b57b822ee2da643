"""What is driven: samples, poses, the action space, and the strata that results are told apart by."""
