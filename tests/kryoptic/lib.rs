//! Nothing: this package only names what is built, see build.
