//! Puts the functions that an agent at work runs next to each other in the release binary.
//!
//! The kernel maps a program's code in windows of 64 KiB around each function that is run. The functions that an agent
//! runs are a third of the program, spread all over it, so that in the linker's own order nearly all of it is resident;
//! side by side they take 4 MiB less. `hot-functions.ld` lists them, and `record` makes that list anew: a function that is
//! missing there, or is there and no longer exists, costs some memory and nothing else.

use std::env;
use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=packaging/link/build.rs");
    println!("cargo::rerun-if-changed=packaging/link/hot-functions.ld");
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|found| found == value);
    // The script is for the linkers that rustc uses by itself there; whoever chose another one may have one without
    // scripts.
    let known_linker = is("CARGO_CFG_TARGET_ARCH", "x86_64")
        && is("CARGO_CFG_TARGET_OS", "linux")
        && is("CARGO_CFG_TARGET_ENV", "gnu")
        && env::var_os("RUSTC_LINKER").is_none()
        && !env::var("CARGO_ENCODED_RUSTFLAGS").is_ok_and(|flags| flags.contains("link"));
    if is("PROFILE", "release") && known_linker {
        let package = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default();
        let script = Path::new(&package).join("packaging/link/hot-functions.ld");
        println!("cargo::rustc-link-arg-bin=pintle=-Wl,--script={}", script.display());
    }
}
