//! One transition at a time.
