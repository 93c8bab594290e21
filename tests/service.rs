//! The agent as a service: the packages and their units on a Debian that runs systemd.

#![allow(clippy::unwrap_used, reason = "a test fails when something unexpected happens")]

mod debian;
mod embedded;

use std::net::{Ipv4Addr, TcpStream};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use debian::machine::Machine;
use debian::packages::PACKAGES;
use debian::{Debian, kubeadm};
use embedded::{DEADLINE, Embedded};
use pintle_test_support::eventually;
use serde_json::Value;

const SERVICE: &str = "pintle.service";
const SOCKET: &str = "pintle-proxy.socket";
/// The port of the socket unit.
const PROXY: u16 = 6444;
/// Only pintle itself may change these.
const KEPT: [&str; 2] = ["/var/lib/pintle/keys", "/var/lib/kubelet/pki"];

/// A machine with the package, this configuration and access to the API server.
fn machine(control_plane: &Embedded, configuration: &str) -> Machine {
    let machine = Machine::boot(Debian::new(), "worker-1", &[kubeadm::programs()]);
    kubeadm::install(&machine);
    let port = control_plane.server_url().rsplit_once(':').unwrap().1.parse().unwrap();
    machine.network().reach(port);
    machine.write("/etc/pintle/bootstrap-kubeconfig", 0o600, control_plane.bootstrap_kubeconfig());
    let package = PACKAGES.put(&machine, "pintle", "1");
    let said = machine.run(&["dpkg", "--install", &package]);
    assert!(said.contains("systemctl enable --now pintle.service"), "{said}");
    let bootstrap = "bootstrap-kubeconfig = \"/etc/pintle/bootstrap-kubeconfig\"";
    machine.write("/etc/pintle/config.toml", 0o644, format!("{bootstrap}\n{configuration}"));
    machine.run(&["pintle", "config", "check"]);
    assert_eq!(machine.property(SERVICE, "ActiveState"), "inactive", "an installation starts nothing");
    assert_eq!(machine.property(SERVICE, "UnitFileState"), "disabled");
    machine
}

/// The identity's part of `pintle status`.
fn status(machine: &Machine) -> Value {
    let text = machine.run(&["pintle", "status", "-o", "json"]);
    serde_json::from_str::<Value>(&text).unwrap()["identities"][0].take()
}

/// Runs `work` while a client connects to the proxy continuously; returns how many of its connections were refused.
fn refused_while(machine: &Machine, work: impl FnOnce()) -> usize {
    let (under_way, ended) = mpsc::channel::<()>();
    let connect = move || {
        let mut refused = 0;
        while ended.recv_timeout(Duration::from_millis(10)) == Err(RecvTimeoutError::Timeout) {
            if TcpStream::connect((Ipv4Addr::LOCALHOST, PROXY)).is_err() {
                refused += 1;
            }
        }
        refused
    };
    thread::scope(|scope| {
        let client = scope.spawn(move || machine.network().run(connect));
        work();
        // The same as in a panic.
        drop(under_way);
        client.join().unwrap()
    })
}

/// kubectl through the proxy, as the node.
fn who_am_i(machine: &Machine) -> String {
    machine.run(&["kubectl", "--kubeconfig=/var/lib/kubelet/proxy.kubeconfig", "auth", "whoami"])
}

#[test]
fn the_service_works_from_installation_to_removal() {
    let control_plane = Embedded::signing_for(3600);
    let machine = machine(&control_plane, "[proxy]\nkubeconfig = \"/var/lib/kubelet/proxy.kubeconfig\"\n");
    // A kubelet has been running here: its files do not belong to the package.
    machine.write("/var/lib/kubelet/pki/kubelet.key", 0o600, "the kubelet's own serving key");

    // As documented in docs/operators.md.
    machine.run(&["systemctl", "enable", "--now", SOCKET]);
    machine.run(&["systemctl", "enable", "--now", SERVICE]);
    assert_eq!(machine.property(SERVICE, "ActiveState"), "active", "READY is sent once the certificate is valid");
    let first = status(&machine);
    assert_eq!(first["state"], "ready");
    let said = machine.property(SERVICE, "StatusText");
    assert!(said.starts_with("system:node:worker-1: Ready, valid until "), "{said}");
    assert!(who_am_i(&machine).contains("system:node:worker-1"));
    check_sandbox(&machine);
    let kept = machine.files(&KEPT);

    let process = machine.property(SERVICE, "MainPID");
    let refused = refused_while(&machine, || {
        machine.run(&["systemctl", "restart", SERVICE]);
        assert!(who_am_i(&machine).contains("system:node:worker-1"));
    });
    let restarted = machine.property(SERVICE, "MainPID");
    assert!(refused == 0 && restarted != process, "{refused} connections were refused");
    // An upgrade restarts the service.
    let package = PACKAGES.put(&machine, "pintle", "2");
    let refused = refused_while(&machine, || {
        machine.run(&["dpkg", "--install", "--force-confold", &package]);
        assert!(who_am_i(&machine).contains("system:node:worker-1"));
    });
    assert!(refused == 0, "{refused} connections were refused");
    assert_ne!(machine.property(SERVICE, "MainPID"), restarted);
    assert_eq!(status(&machine)["serial"], first["serial"], "with the certificate that it has");

    check_watchdog(&machine);

    assert_eq!(machine.files(&KEPT), kept, "keys and certificates are unchanged");
    machine.run(&["dpkg", "--remove", "pintle"]);
    for unit in [SERVICE, SOCKET] {
        assert_eq!(machine.property(unit, "ActiveState"), "inactive", "{unit}");
    }
    assert!(machine.network().run(|| TcpStream::connect((Ipv4Addr::LOCALHOST, PROXY))).is_err());
    machine.run(&["dpkg", "--purge", "pintle"]);
    assert_eq!(machine.files(&KEPT), kept, "nor do removal and purge");
    assert_eq!(machine.run(&["systemctl", "is-system-running"]), "running\n");
}

/// Checks the unit's sandbox.
fn check_sandbox(machine: &Machine) {
    let process = machine.property(SERVICE, "MainPID");
    let status = machine.run(&["cat", &format!("/proc/{process}/status")]);
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line} is not in\n{status}");
    }
    let root = format!("/proc/{process}/root");
    for path in ["/etc/pintle/config.toml", "/usr/bin/pintle", "/sys/fs/cgroup/cgroup.procs", "/proc/sys/kernel/panic"]
    {
        let written = machine.output(&["sh", "-c", &format!("echo >>{root}{path}")]);
        assert!(!written.status.success(), "{path} is writable");
    }
    machine.run(&[
        "sh",
        "-c",
        &format!("touch {root}/var/lib/kubelet/pki/.test && rm {root}/var/lib/kubelet/pki/.test"),
    ]);
}

/// Checks that an agent that hangs is restarted without refusing a client.
fn check_watchdog(machine: &Machine) {
    let given = "[Service]\nWatchdogSec=20s\n";
    machine.write("/etc/systemd/system/pintle.service.d/watchdog.conf", 0o644, given);
    machine.run(&["systemctl", "daemon-reload"]);
    machine.run(&["systemctl", "restart", SERVICE]);
    let process = machine.property(SERVICE, "MainPID");
    let refused = refused_while(machine, || {
        machine.run(&["systemctl", "kill", "--signal=STOP", "--kill-whom=main", SERVICE]);
        eventually("the watchdog has restarted the agent", DEADLINE, || {
            let restarted = machine.property(SERVICE, "MainPID");
            let active = machine.property(SERVICE, "ActiveState") == "active";
            (active && restarted != process).then_some(())
        });
    });
    assert!(refused == 0, "{refused} connections were refused");
    let log = machine.journal(SERVICE);
    assert!(log.contains("Watchdog timeout"), "{log}");
    assert_eq!(machine.property(SERVICE, "NRestarts"), "1");
    assert_eq!(status(machine)["state"], "ready");
    // A healthy agent keeps notifying the watchdog.
    let answered = machine.property(SERVICE, "WatchdogTimestampMonotonic");
    eventually("the watchdog is notified", DEADLINE, || {
        (machine.property(SERVICE, "WatchdogTimestampMonotonic") != answered).then_some(())
    });
}

/// Waits until the certificate is valid with its key in this backend, and rotates it once.
#[track_caller]
fn key_is_in(machine: &Machine, backend: &str) {
    eventually("a certificate is valid, with its key in the backend", DEADLINE, || {
        let status = status(machine);
        (status["state"] == "ready" && status["key"]["backend"] == backend).then_some(())
    });
    let said = machine.run(&["pintle", "rotate", "--wait"]);
    assert!(said.starts_with("rotated: "), "{said}");
}

/// As documented in docs/operators.md: the service gets the PIN from systemd, possibly encrypted on disk, and access
/// to the token's files through its group; or the module's process runs as a user that has access to both.
#[test]
fn a_token_in_the_service_by_its_group_and_by_its_user() {
    let control_plane = Embedded::signing_for(3600);
    let token = |name: &str, more: &str| {
        format!(
            "[backends.{name}]\ntype = \"pkcs11\"\nuri = \"pkcs11:token={name}\"\n\
             module = \"/usr/lib/softhsm/libsofthsm2.so\"\n{more}\n"
        )
    };
    let by_group = token("shared", "pin-file = \"pin\"");
    let machine = machine(&control_plane, &format!("backend = \"shared\"\n{by_group}"));
    machine.run(&["apt-get", "install", "--yes", "--no-install-recommends", "softhsm2"]);
    machine.script(
        "umask 077
        useradd --system --gid softhsm hsm
        for token in shared own; do
          od -An -N8 -tx1 /dev/urandom | tr -d ' \\n' >/root/$token
        done
        initialise='softhsm2-util --init-token --free --label $0 --so-pin $1 --pin $1'
        bash -c \"$initialise\" shared \"$(cat /root/shared)\"
        setpriv --reuid=hsm --regid=softhsm --clear-groups bash -c \"$initialise\" own \"$(cat /root/own)\"
        systemd-creds encrypt --name=pin /root/shared /etc/pintle/pin.cred
        install --owner=hsm --mode=0400 /root/own /etc/pintle/own-pin",
    );
    let drop_in = |lines: &str| {
        let text = format!("[Service]\nReadWritePaths=/var/lib/softhsm\n{lines}");
        machine.write("/etc/systemd/system/pintle.service.d/token.conf", 0o644, text);
        machine.run(&["systemctl", "daemon-reload"]);
    };
    machine.run(&["systemctl", "enable", SERVICE]);
    for pin in ["LoadCredential=pin:/root/shared", "LoadCredentialEncrypted=pin:/etc/pintle/pin.cred"] {
        drop_in(&format!("SupplementaryGroups=softhsm\n{pin}\n"));
        machine.run(&["systemctl", "restart", SERVICE]);
        key_is_in(&machine, "shared");
    }

    let by_user = token("own", "pin-file = \"/etc/pintle/own-pin\"\nisolation = { user = \"hsm\" }");
    machine.run(&["sed", "-i", "s/^backend = .*/backend = \"own\"/", "/etc/pintle/config.toml"]);
    let configuration = std::fs::read_to_string(machine.path("/etc/pintle/config.toml")).unwrap();
    machine.write("/etc/pintle/config.toml", 0o644, configuration + &by_user);
    drop_in(
        "SupplementaryGroups=softhsm\nLoadCredentialEncrypted=pin:/etc/pintle/pin.cred\n\
         CapabilityBoundingSet=CAP_SETUID CAP_SETGID CAP_KILL\nSystemCallFilter=@setuid\n",
    );
    machine.run(&["systemctl", "restart", SERVICE]);
    key_is_in(&machine, "own");
    let users = "for process in $(cat /sys/fs/cgroup/system.slice/pintle.service/cgroup.procs); do
          stat --format=%U /proc/$process
        done | sort --unique";
    assert_eq!(machine.script(users), "hsm\nroot\n");
}
