//! The rotation of a node's identity as a pure function: no async, no files, no clock.
