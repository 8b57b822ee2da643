"""Operations on whole stores: verify and repair, copy, collect garbage, summarise."""
