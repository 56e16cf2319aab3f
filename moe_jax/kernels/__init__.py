"""Operations on arrays, each with a reference and the implementations of its backends."""
