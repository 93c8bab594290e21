//! Checks that the committed C header matches the types in `src/abi`. To update it, run
//! `PINTLE_BLESS=1 cargo test -p pintle-plugins-api header`.

use std::path::Path;

const TOP: &str = "\
/*
 * The C ABI of a pintle key backend: the functions of a shared object that holds a node's private key.
 *
 * Threads: functions may block for as long as the device needs. The host never makes two calls on one context at once,
 * but successive calls may come from different threads, and calls on different contexts may overlap. There are no
 * callbacks. No exception and no longjmp may leave a function. The host makes its calls on a separate thread or in a
 * separate process, and kills a process that misses its deadline.
 *
 * Memory: the caller owns every argument. The memory of a PintleBytes is valid only during the call. Results are
 * written to the caller's PintleBuffer. Neither side frees memory that the other has allocated.
 *
 * Versions: both tables begin with their size and version and grow only at the end. Read a field only if it lies within
 * struct_size. Numbers never change their meaning.
 *
 * Return values: PINTLE_OK, PINTLE_BUFFER_TOO_SMALL, or a PintleError, chosen by what the caller should do next. The
 * host trusts no result: it parses public keys, verifies signatures and checks lengths.
 *
 * Trust: a plugin runs with the host's privileges. pintle loads a plugin only if no user but root, or the user that
 * runs pintle, can change the file or any directory in its path.
 *
 * Generated from plugins-api/src by its tests; do not edit.
 */";

fn generated() -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let renamed = [
        ("BackendErrorKind", "PintleError"),
        ("KeyAlgorithm", "PintleKeyAlgorithm"),
        ("SignatureScheme", "PintleSignatureScheme"),
    ];
    let mut configuration = cbindgen::Config {
        language: cbindgen::Language::C,
        header: Some(TOP.to_owned()),
        include_guard: Some("PINTLE_BACKEND_H".to_owned()),
        cpp_compat: true,
        no_includes: true,
        sys_includes: vec!["stddef.h".to_owned(), "stdint.h".to_owned()],
        usize_is_size_t: true,
        style: cbindgen::Style::Both,
        line_length: 120,
        tab_width: 4,
        documentation_style: cbindgen::DocumentationStyle::Doxy,
        ..cbindgen::Config::default()
    };
    configuration.enumeration.rename_variants = cbindgen::RenameRule::QualifiedScreamingSnakeCase;
    for (rust, c) in renamed {
        configuration.export.include.push(rust.to_owned());
        configuration.export.rename.insert(rust.to_owned(), c.to_owned());
    }
    let mut header = Vec::new();
    cbindgen::Builder::new()
        .with_config(configuration)
        .with_src(source.join("error.rs"))
        .with_src(source.join("key/algorithm.rs"))
        .with_src(source.join("abi/mod.rs"))
        .generate()
        .expect("the sources parse")
        .write(&mut header);
    let header = String::from_utf8(header).expect("the header is text");
    // cbindgen also emits the Rust types' associated constants, which are of no use in C.
    let paragraphs = header.split("\n\n");
    let kept: Vec<_> = paragraphs.filter(|text| !text.contains("_ALL {") && !text.contains("#define KeyId_")).collect();
    kept.join("\n\n")
}

#[test]
fn committed_header_matches_the_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/pintle_backend.h");
    let generated = generated();
    if std::env::var_os("PINTLE_BLESS").is_some() {
        std::fs::write(&path, &generated).expect("the header can be written");
    }
    let committed = std::fs::read_to_string(&path).expect("the header is committed");
    assert!(
        committed == generated,
        "include/pintle_backend.h does not match src/abi; run PINTLE_BLESS=1 cargo test -p pintle-plugins-api header"
    );
}
