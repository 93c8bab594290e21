//! The operators' pages tell the truth: every command of docs/hardware.md is run, in order, as it stands there.

mod device;
mod embedded;

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use device::tpm_plugin;
use embedded::Embedded;
use pintle_test_support::{ScratchDirectory, Swtpm, TokenModule};

const PAGE: &str = include_str!("../docs/hardware.md");

/// The commands of the page as one script that says which line of the page it is at.
fn script(page: &str) -> String {
    let mut script = String::from("set -euo pipefail\n");
    let mut in_block = false;
    for (index, line) in page.lines().enumerate() {
        match line.strip_prefix("```") {
            Some("sh test") => {
                in_block = true;
                writeln!(script, "echo '--- line {} of the page'", index + 1).expect("text can be written");
            }
            Some("") if in_block => in_block = false,
            Some(language) => assert!(!["sh", "console", "bash"].contains(&language), "line {} is not run", index + 1),
            None if in_block => script = script + line + "\n",
            None => {}
        }
    }
    script
}

#[test]
fn commands_of_the_hardware_page_work() {
    let scratch = ScratchDirectory::new();
    let swtpm = Swtpm::new(scratch.join("tpm"));
    let control_plane = Embedded::signing_for(3600);
    for directory in ["etc", "tokens"] {
        std::fs::create_dir(scratch.join(directory)).expect("a directory");
    }
    let _ = scratch.write("etc/bootstrap-kubeconfig", control_plane.bootstrap_kubeconfig());
    let tokens = format!("directories.tokendir = {}\n", scratch.join("tokens").display());
    let program = Path::new(env!("CARGO_BIN_EXE_pintle"));
    let programs = program.parent().expect("the program is in a directory");
    let plugins = tpm_plugin().parent().expect("the plugin is in a directory").to_owned();

    let output = Command::new("bash")
        .args(["-c", &script(PAGE)])
        .env("PATH", format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default()))
        .env("SOFTHSM2_CONF", scratch.write("softhsm2.conf", tokens))
        .env("ETC", scratch.join("etc"))
        .env("STATE", scratch.join("state"))
        .env("PKI", scratch.join("kubelet/pki"))
        .env("NODE", "worker-1")
        .env("MODULE", TokenModule::SoftHsm.path())
        .env("TCTI", swtpm.tcti())
        .env("PLUGINS", plugins)
        .current_dir(scratch.path())
        .stdin(Stdio::null())
        .output()
        .expect("bash starts");
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    println!("{said}");
    for words in
        ["never extractable", "Signature Verified Successfully", "Verified OK", "token/ecdsa-p256", "tpm/ecdsa-p256"]
    {
        assert!(said.contains(words), "nothing says {words:?}:\n{said}");
    }
}

#[test]
fn script_holds_the_marked_blocks_and_nothing_else() {
    let page = "text\n```ini\na = 1\n```\n```sh test\nfirst\n```\nmore\n```sh test\nsecond\n```\n";
    let lines: Vec<_> = script(page).lines().map(str::to_owned).collect();
    assert_eq!(
        lines,
        ["set -euo pipefail", "echo '--- line 5 of the page'", "first", "echo '--- line 9 of the page'", "second"]
    );
}
