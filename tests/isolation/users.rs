//! The users that a module may run as: those of the name service, not only those in /etc/passwd.

use std::path::{Path, PathBuf};
use std::process::Command;

use pintle_test_support::ScratchDirectory;

/// Builds a library that simulates a directory service.
fn name_service(scratch: &ScratchDirectory) -> PathBuf {
    let library = scratch.join("libname_service.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/isolation/name_service.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]).arg(&library).arg(source);
    assert!(compiler.arg("-ldl").status().expect("a C compiler is installed").success());
    library
}

#[test]
fn users_and_groups_of_a_directory_service_are_known() {
    let scratch = ScratchDirectory::new();
    let library = name_service(&scratch);
    let check = |user: &str, group: &str| {
        let configuration = scratch.write(
            "config.toml",
            format!(
                "node-name = \"worker-1\"\n[proxy]\nuser = \"{user}\"\n[backends.vendor]\ntype = \"plugin\"\n\
                 library = \"vendor\"\nisolation = {{ user = \"{user}\", group = \"{group}\" }}\n"
            ),
        );
        let mut command = Command::new(env!("CARGO_BIN_EXE_pintle"));
        command.args(["config", "check", "--config"]).arg(configuration).env("LD_PRELOAD", &library);
        let output = command.output().expect("pintle starts");
        (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let (valid, text) = check("directory-user", "directory-group");
    assert!(valid && text.contains("uid 47110, gid 47111"), "{text}");
    assert!(check("nobody", "directory-group").0);
    let (valid, text) = check("directory-user", "no-such-group");
    assert!(!valid && text.contains("there is no group \"no-such-group\"") && text.contains("getent"), "{text}");
}
