//! Runs the commands of docs/hardware.md and docs/kubelet.md in order.

mod debian;
mod device;
mod embedded;

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use debian::machine::Machine;
use debian::packages::PACKAGES;
use debian::{Debian, kubeadm};
use device::tpm_plugin;
use embedded::Embedded;
use pintle_test_support::{ControlPlane, Options, ScratchDirectory, Swtpm, TokenModule, eventually};

const HARDWARE: &str = include_str!("../docs/hardware.md");
const KUBELET: &str = include_str!("../docs/kubelet.md");
/// Limit for operations that take seconds.
const DEADLINE: Duration = Duration::from_secs(120);

/// The page's commands as one script, which prints the line of the page that it is at.
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
        .args(["-c", &script(HARDWARE)])
        .env("PATH", format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default()))
        .env("SOFTHSM2_CONF", scratch.write("softhsm2.conf", tokens))
        .env("ETC", scratch.join("etc"))
        .env("STATE", scratch.join("state"))
        .env("PKI", scratch.join("kubelet/pki"))
        .env("NODE", "worker-1")
        .env("MODULE", TokenModule::SoftHsm.path())
        .env("TCTI", swtpm.tcti())
        .env("PLUGINS", plugins)
        .env("BLOBS", scratch.join("blobs"))
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
        assert!(said.contains(words), "{words:?} is missing in:\n{said}");
    }
}

/// Runs a part of docs/kubelet.md on the machine.
#[track_caller]
fn run_part(machine: &Machine, part: &str, tcti: &str) -> String {
    let said = debian::succeed(machine.command(&["bash", "-c", &script(part)]).env("TCTI", tcti));
    println!("{said}");
    said
}

#[test]
fn commands_of_the_kubelet_page_work() {
    let cluster = ControlPlane::start(Options::default());
    let scratch = ScratchDirectory::new();
    let swtpm = Swtpm::new(scratch.join("tpm"));
    let mut machine = Machine::boot(Debian::new(), "worker-1", &[kubeadm::programs()]);
    kubeadm::join(&machine, &cluster);
    for port in swtpm.ports() {
        machine.network().reach(port);
    }
    let packages = ["pintle", "pintle-tpm"].map(|name| PACKAGES.put(&machine, name, "1"));
    machine.run(&["apt-get", "install", "--yes", "--no-install-recommends", &packages[0], &packages[1]]);
    let (node, user) = ("worker-1", "system:node:worker-1");
    let (to, back) = KUBELET.split_at(KUBELET.find("\n## Back\n").expect("the page has a way back"));
    // Keeps the line numbers of the page.
    let back = "\n".repeat(to.matches('\n').count()) + back;

    let said = run_part(&machine, to, &swtpm.tcti());
    for words in
        ["tpm/ecdsa-p256   Ready", "tpm       worker-1_client_", "_2   ecdsa-p256   in-use", user, "rotated: serial"]
    {
        assert!(said.contains(words), "{words:?} is missing");
    }
    kubeadm::wait_ready(&cluster, node);
    // The kubelet uses the certificate that pintle holds, whatever is in its own files, and does not renew it itself.
    let is_in_use = |machine: &Machine| {
        let status = machine.run(&["pintle", "status", "-o", "json"]);
        let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
        let fingerprint = status["identities"][0]["fingerprint"].as_str().expect("there is a certificate").to_owned();
        let mut kubelets = cluster.audit_events().into_iter().filter(|event| {
            event.username == user && event.user_agent.starts_with("kubelet/") && event.resource == "nodes"
        });
        kubelets.next_back().is_some_and(|event| event.certificate_sha256 == Some(fingerprint))
    };
    eventually("the kubelet uses the latest certificate", DEADLINE, || is_in_use(&machine).then_some(()));
    // Drain connections faster than in 15 minutes, to see more than one rotation. The kubelet also does not notice
    // that pintle is restarted.
    let process = machine.property("kubelet.service", "MainPID");
    machine.run(&["sed", "-i", "s/^\\[proxy\\]$/&\\ndrain = \"2s\"/", "/etc/pintle/config.toml"]);
    machine.run(&["systemctl", "restart", "pintle.service"]);
    for _ in 0..2 {
        machine.run(&["pintle", "rotate", "--wait"]);
        eventually("the kubelet uses the new certificate", DEADLINE, || is_in_use(&machine).then_some(()));
    }
    kubeadm::wait_ready(&cluster, node);
    assert_eq!(machine.property("kubelet.service", "MainPID"), process, "it was not restarted");

    // After a reboot everything starts by itself, the kubelet after pintle.
    machine.reboot();
    kubeadm::wait_ready(&cluster, node);
    let started = ["pintle.service", "kubelet.service"].map(|unit| {
        machine.property(unit, "ActiveEnterTimestampMonotonic").parse::<u64>().expect("a number of microseconds")
    });
    assert!(started[0] <= started[1], "{started:?}");
    eventually("the kubelet uses the certificate from before", DEADLINE, || is_in_use(&machine).then_some(()));
    let requests = cluster.requests();
    assert!(requests.iter().filter(|request| !request.name.starts_with("pintle-")).count() == 1, "{requests:?}");

    run_part(&machine, &back, "");
    kubeadm::wait_ready(&cluster, node);
    let current = machine.path("/var/lib/kubelet/pki/kubelet-client-current.pem");
    let current = std::fs::read_to_string(current).expect("there is a pair");
    assert!(current.contains("BEGIN PRIVATE KEY"), "its key is in it");
    let left = machine.files(&["/var/lib/pintle/tpm"]);
    assert_eq!(left.len(), 1, "no key is left in the TPM: {:?}", left.keys());
    assert!(machine.run(&["kubectl", "--kubeconfig=/etc/kubernetes/kubelet.conf", "auth", "whoami"]).contains(user));
    machine.run(&["systemctl", "is-system-running"]);
}

#[test]
fn the_script_contains_only_the_marked_blocks() {
    let page = "text\n```ini\na = 1\n```\n```sh test\nfirst\n```\nmore\n```sh test\nsecond\n```\n";
    let lines: Vec<_> = script(page).lines().map(str::to_owned).collect();
    assert_eq!(
        lines,
        ["set -euo pipefail", "echo '--- line 5 of the page'", "first", "echo '--- line 9 of the page'", "second"]
    );
}
