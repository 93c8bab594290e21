//! The log: the agent does not block if it is not read.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pintle_test_support::{Node, eventually};
use rustix::fs::{OFlags, fcntl_setfl};

const DEADLINE: Duration = Duration::from_secs(60);

/// A child that is killed when the test ends.
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_agent_whose_log_is_not_read_works_and_exits_on_sigterm() {
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), "unread");
    let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
    // Filled before the agent writes anything.
    fcntl_setfl(&writer, OFlags::NONBLOCK).expect("a flag");
    while writer.write(&[b'x'; 512]).is_ok() {}
    fcntl_setfl(&writer, OFlags::empty()).expect("a flag");
    let child = Command::new(env!("CARGO_BIN_EXE_pintle"))
        .args(["run", "--node-name=unread", "--log-format=json"])
        .arg(format!("--config={}", node.scratch().join("config.toml").display()))
        .arg(format!("--state-dir={}", node.state_dir().display()))
        .arg(format!("--cert-dir={}", node.cert_dir().display()))
        .arg(format!("--kubeconfig={}", node.kubeconfig().display()))
        .stdin(Stdio::null())
        .stderr(writer)
        .spawn()
        .expect("pintle starts");
    let mut agent = Guarded(child);
    let socket = node.state_dir().join("control.sock");
    eventually("the agent listens", DEADLINE, || socket.exists().then_some(()));
    // This is logged before it appears in the status.
    eventually("the status says what is missing", DEADLINE, || {
        (node.status()["state"] == "no-credential").then_some(())
    });
    let pid = rustix::process::Pid::from_child(&agent.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
    let status = eventually("it exits", DEADLINE, || agent.0.try_wait().expect("a child"));
    assert!(status.success(), "{status}");
    let mut text = Vec::new();
    reader.read_to_end(&mut text).expect("readable");
    assert!(text.iter().all(|byte| *byte == b'x'), "nothing was written: {}", String::from_utf8_lossy(&text));
}
