//! `pintle demo` as a user sees it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use pintle_test_support::{ProcessCommand, ScratchDirectory, TestProcess, eventually, kubectl};

/// The demo is documented to take less than a minute.
const DEADLINE: Duration = Duration::from_secs(60);

fn start(scratch: &ScratchDirectory, arguments: &[&str]) -> TestProcess {
    ProcessCommand::new(env!("CARGO_BIN_EXE_pintle"), scratch.join("demo.log"))
        .argument("demo")
        .arguments(arguments.iter().copied())
        .environment("TMPDIR", scratch.path())
        .start()
}

/// Checks that the output contains these texts in this order.
#[track_caller]
fn assert_in_order(output: &str, texts: &[&str]) {
    let mut rest = output;
    for text in texts {
        let Some(found) = rest.find(text) else { panic!("{text:?} is missing or out of order in:\n{output}") };
        rest = &rest[found + text.len()..];
    }
}

fn wait_for(demo: &mut TestProcess, text: &str) -> String {
    eventually(text, DEADLINE, || {
        assert!(demo.is_running(), "{}", demo.output());
        Some(demo.output()).filter(|output| output.contains(text))
    })
}

/// The words of a command that the demo prints.
fn said(output: &str, beginning: &str) -> Vec<String> {
    let line = output.lines().find_map(|line| line.find(beginning).map(|at| &line[at..]));
    line.expect("the demo prints the command").split_whitespace().map(str::to_owned).collect()
}

/// Runs a command that the demo has printed, with the test bed's kubectl.
fn run(scratch: &ScratchDirectory, words: &[String]) -> (ExitStatus, String) {
    let mut command = match words[0].as_str() {
        "kubectl" => kubectl(),
        other => Command::new(other),
    };
    let output = command.args(&words[1..]).env("HOME", scratch.path()).output().expect("it starts");
    (output.status, String::from_utf8_lossy(&output.stdout).into_owned())
}

fn left_behind(scratch: &ScratchDirectory) -> Vec<PathBuf> {
    let is_demo = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pintle-demo-"));
    let entries = std::fs::read_dir(scratch.path()).expect("readable").filter_map(Result::ok);
    entries.map(|entry| entry.path()).filter(|path| is_demo(path)).collect()
}

#[test]
fn the_demo_completes_with_the_file_backend() {
    completes(&[], "file:");
}

#[test]
fn the_demo_completes_with_a_token() {
    completes(&["--backend", "pkcs11"], "key token:");
}

#[test]
fn the_demo_completes_with_a_tpm() {
    completes(&["--backend", "tpm"], "key tpm:");
}

fn completes(arguments: &[&str], key: &str) {
    let scratch = ScratchDirectory::new();
    let mut demo = start(&scratch, arguments);
    assert!(demo.wait(DEADLINE).success(), "{}", demo.output());
    let rotation = ["generated", "Pending", "Approved", "Issued", "authenticates serial", "is current", "rotates in"];
    let milestones =
        [&["Bootstrap:"], &rotation[..], &["Rotation 1:"], &rotation, &["Rotation 2:"], &rotation].concat();
    assert_in_order(&demo.output(), &milestones);
    assert!(demo.output().contains("as system:node:demo-node"));
    assert!(demo.output().contains(key), "{key} in {}", demo.output());
    assert_eq!(left_behind(&scratch), Vec::<PathBuf>::new());
}

#[test]
fn the_demo_waits_for_manual_approval_until_stopped() {
    let scratch = ScratchDirectory::new();
    let mut demo = start(&scratch, &["--manual-approval", "--keep", "--cluster-signing-duration=1h"]);
    let output = wait_for(&mut demo, "approve it: ");
    assert!(!output.contains("Approved"));
    let (status, listed) = run(&scratch, &said(&output, "kubectl"));
    assert!(status.success() && listed.contains("Pending"), "{listed}");
    let approve = said(&output[output.find("approve it: ").unwrap_or_default()..], "kubectl");
    assert!(run(&scratch, &approve).0.success());
    let output = wait_for(&mut demo, "rotates in");
    assert_in_order(&output, &["Pending", "Approved", "Issued", "authenticates serial", "is current"]);
    let (status, dates) = run(&scratch, &said(&output, "openssl"));
    assert!(status.success() && dates.contains("system:node:demo-node") && dates.contains("notAfter="), "{dates}");

    assert_eq!(left_behind(&scratch).len(), 1);
    assert!(demo.terminate(DEADLINE).success(), "{}", demo.output());
    assert_eq!(left_behind(&scratch), Vec::<PathBuf>::new());
}
