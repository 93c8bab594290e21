//! Keys as PKCS#8 files.
