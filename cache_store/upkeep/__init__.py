"""Operations on whole stores: verify and repair, copy, collect garbage, count what is there."""
