//! Disks that are full, and have room again.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pintle_test_support::{Node, Pair, ProcessCommand, TestProcess, eventually};

use crate::embedded::{DEADLINE, Embedded, public_key_of};
use crate::{HOUR, new_node};

/// An agent one of whose directories is a tmpfs of 64 KiB, which goes with it.
struct Cramped<'a> {
    node: &'a Node,
    directory: PathBuf,
    process: TestProcess,
}

impl<'a> Cramped<'a> {
    fn start(node: &'a Node, directory: PathBuf) -> Self {
        let script = r#"mkdir -p "$0" && mount -t tmpfs -o size=64k,mode=700 tmpfs "$0" && exec "$@""#;
        let process = ProcessCommand::new("/bin/sh", node.scratch().join("cramped.log"))
            .private_mounts()
            .arguments(["-c", script])
            .argument(&directory)
            .arguments([env!("CARGO_BIN_EXE_pintle"), "run"])
            .arguments(node.flags())
            .start();
        Self { node, directory, process }
    }

    /// A path as the agent sees it.
    fn seen(&self, path: &Path) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.process.id())).join(path.strip_prefix("/").expect("absolute"))
    }

    fn fill(&self) {
        let mut file = fs::File::create(self.seen(&self.directory.join("filler"))).expect("created");
        while file.write_all(&[1; 512]).is_ok() {}
    }

    fn make_room(&self) {
        fs::remove_file(self.seen(&self.directory.join("filler"))).expect("removed");
    }

    fn rotate(&self) {
        assert!(self.pintle("rotate").status.success());
    }

    /// Runs a command beside the agent, where it sees the same directory.
    fn pintle(&self, command: &str) -> std::process::Output {
        let target = format!("--target={}", self.process.id());
        Command::new("nsenter")
            .args([target.as_str(), "--mount", env!("CARGO_BIN_EXE_pintle"), command])
            .args(self.node.flags())
            .output()
            .expect("nsenter starts")
    }

    /// Waits until the log has so many events of a name whose line contains the words.
    fn wait_for(&mut self, event: &str, words: &str, count: usize) {
        eventually(event, DEADLINE, || {
            assert!(self.process.is_running(), "{}", self.process.output());
            let event = format!("\"event\":\"{event}\"");
            let lines = self.process.output();
            let found = lines.lines().filter(|line| line.contains(&event) && line.contains(words)).count();
            (found >= count).then_some(())
        });
    }
}

#[test]
fn c29_a_full_disk_costs_no_certificate() {
    let control_plane = Embedded::signing_for(HOUR);
    for which in ["pki", "state"] {
        let node = new_node(&format!("full-{which}"));
        node.give_bootstrap(control_plane.bootstrap_kubeconfig());
        let mut cramped = Cramped::start(&node, node.scratch().join(which));
        cramped.wait_for("holding", "", 1);
        cramped.fill();
        cramped.rotate();
        if which == "pki" {
            cramped.wait_for("certificate_issued", "", 2);
            cramped.wait_for("failed", "cannot be written", 2);
            assert_eq!(control_plane.requests_of(node.name()).len(), 2);
        } else {
            cramped.wait_for("journal_not_saved", "", 2);
            assert_eq!(control_plane.requests_of(node.name()).len(), 1, "nothing is done that is not written down");
            let status = cramped.pintle("status").stdout;
            assert!(String::from_utf8_lossy(&status).contains("the journal cannot be saved"), "{status:?}");
        }
        cramped.make_room();
        cramped.wait_for("holding", "", 2);
        let requests = control_plane.requests_of(node.name());
        assert_eq!(requests.len(), 2, "{which}");
        let current = fs::read_link(cramped.seen(&node.current_path())).expect("a link");
        let held = Pair::read(&cramped.seen(&node.cert_dir()).join(current)).expect("a pair");
        assert!(requests.iter().any(|request| public_key_of(request) == held.public_key));
    }
}

#[test]
fn c29_what_was_issued_while_the_journal_could_not_be_written_is_kept() {
    let control_plane = Embedded::start(pintle::demo::control_plane::Options {
        approval_delay: Duration::from_secs(3),
        ..pintle::demo::control_plane::Options::default()
    });
    let node = new_node("full-meanwhile");
    node.give_bootstrap(control_plane.bootstrap_kubeconfig());
    let mut cramped = Cramped::start(&node, node.state_dir());
    cramped.wait_for("request_pending", "", 1);
    cramped.fill();
    cramped.wait_for("certificate_issued", "", 1);
    cramped.wait_for("journal_not_saved", "", 1);
    cramped.make_room();
    cramped.wait_for("holding", "", 1);
    let requests = control_plane.requests_of("full-meanwhile");
    assert_eq!(requests.len(), 1);
    assert_eq!(node.current().map(|pair| pair.public_key), Some(public_key_of(&requests[0])));
}
