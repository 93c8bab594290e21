//! What operators install: the units, the configuration and the Debian packages, on a clean Debian.

#![allow(clippy::unwrap_used, reason = "a test fails when something unexpected happens")]

mod debian;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use debian::packages::{PACKAGES, PINTLE, PLUGIN, Packages, repository};
use debian::{Debian, output, succeed, text};
use pintle::demo::control_plane::{self, ControlPlane, Options};
use pintle_test_support::ScratchDirectory;

/// The directories with keys, journal and certificates in a default installation.
const KEPT: [&str; 2] = ["/var/lib/pintle", "/var/lib/kubelet"];

/// Runs a command in a mount namespace where both packages' files are overlaid on this machine's.
fn as_if_installed(words: &[&str]) -> Command {
    static UNPACKED: LazyLock<[ScratchDirectory; 2]> =
        LazyLock::new(|| ["pintle", "pintle-tpm"].map(|name| PACKAGES.unpacked(name)));
    let mut script = String::from("set -e\n");
    for (directory, trees) in
        [("usr/bin", &UNPACKED[..1]), ("usr/lib/systemd/system", &UNPACKED[..]), ("usr/share/man/man1", &UNPACKED[..1])]
    {
        let layers: Vec<String> = trees.iter().map(|tree| tree.join(directory).display().to_string()).collect();
        let layers = layers.join(":");
        script += &format!("mount -t overlay -o lowerdir={layers}:/{directory} overlay /{directory}\n");
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &(script + r#"exec "$0" "$@""#)]).args(words);
    command
}

#[test]
fn the_units_are_valid() {
    let said = succeed(&mut as_if_installed(&["systemd-analyze", "verify", "--man=no", "pintle.service"]));
    assert_eq!(said, "");
    let said = succeed(&mut as_if_installed(&["systemd-analyze", "verify", "--man=no", "pintle-proxy.socket"]));
    assert_eq!(said, "");
    assert!(PACKAGES.unpacked("pintle").join("usr/share/man/man1/pintle.1.gz").exists());
}

/// Checks the exposure level, in tenths. The output lists what is still allowed.
#[test]
fn the_service_is_confined() {
    let words = ["systemd-analyze", "security", "--offline=true", "--threshold=19", "pintle.service"];
    let table = succeed(&mut as_if_installed(&words));
    assert!(table.contains("Overall exposure level for pintle.service"), "{table}");
}

#[test]
fn the_configuration_names_every_key_with_its_default() {
    let text = std::fs::read_to_string(repository().join("packaging/config.toml")).unwrap();
    let scratch = ScratchDirectory::new();
    let check = |content: &str| {
        let file = scratch.write("config.toml", content);
        succeed(Command::new(PINTLE).args(["config", "check", "--node-name", "worker-1", "--config"]).arg(file))
    };
    // A setting is commented out with '#', prose with '# '.
    let setting =
        |line: &str| line.strip_prefix('#').filter(|rest| !rest.is_empty() && !rest.starts_with(' ')).is_some();
    let uncommented: Vec<&str> = text.lines().map(|line| if setting(line) { &line[1..] } else { line }).collect();
    assert!(text.lines().all(|line| line.is_empty() || line.starts_with('#')), "everything is commented out");
    let defaults = check("");
    assert_eq!(check(&text), defaults);
    // Keys without a default say so, and have an example. Tables are examples too; the proxy's table shows the
    // defaults of an empty one.
    let all = check(&uncommented.join("\n"));
    let defaults = check("[proxy]");
    // The set of backends has no default; each table is an example.
    let keys = |text: &str| {
        let lines = text.lines().filter(|line| !line.starts_with("backends "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    for (line, default) in keys(&all).into_iter().zip(keys(&defaults)) {
        let none = ["none", "what the signer gives"].iter().any(|none| default.ends_with(none));
        assert!(line == default || none, "{line:?} is not the default {default:?}");
    }
    // Some of the keys above are not allowed with several identities, whose example is indented and valid by itself.
    let example: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("#   ")).collect();
    let identities = check(&example.join("\n"));
    assert!(identities.contains("identity kubelet\n") && identities.contains("identity monitoring\n"), "{identities}");
    // New keys must be added to the file: the parser's error lists all that it knows.
    let file = scratch.write("config.toml", "no-such-key = 1\n");
    let refused = output(Command::new(PINTLE).args(["config", "check", "--config"]).arg(file));
    let refused = debian::text(&refused);
    let known: Vec<&str> = refused.split('`').skip(3).step_by(2).collect();
    assert!(known.contains(&"cert-dir"), "{refused}");
    for key in known {
        let there = uncommented.iter().chain(&example).any(|line| {
            line.strip_prefix(key).is_some_and(|rest| rest.starts_with(" ="))
                || line.starts_with(&format!("[{key}."))
                || **line == format!("[{key}]")
                || **line == format!("[[{key}]]")
        });
        assert!(there, "packaging/config.toml lacks {key}");
    }
}

#[test]
fn packages_are_reproducible() {
    let again = ScratchDirectory::new();
    Packages::build(again.path(), "1", "077");
    for name in ["pintle", "pintle-tpm"] {
        let first = PACKAGES.file(name, "1");
        let second = again.join(first.file_name().unwrap());
        assert!(std::fs::read(&first).unwrap() == std::fs::read(second).unwrap(), "{name} differs");
    }
}

/// `.cargo/config.toml` disables AWS-LC's CPU jitter entropy, which costs every process about 70 ms before its first
/// key.
#[test]
fn randomness_comes_from_the_kernel() {
    for binary in [PathBuf::from(PINTLE), Path::new(PINTLE).with_file_name(PLUGIN)] {
        let symbols = succeed(Command::new("nm").arg(&binary));
        assert!(symbols.contains("RAND_bytes"), "{} has the names of AWS-LC's functions", binary.display());
        let jitter: Vec<&str> = symbols.lines().filter(|line| line.contains("jent_")).collect();
        assert!(jitter.is_empty(), "{}: {jitter:?}", binary.display());
    }
}

#[test]
fn the_agent_links_no_token_or_tpm_library() {
    let debian = Debian::new();
    let package = PACKAGES.put(&debian, "pintle", "1");
    debian.run(&["dpkg", "--install", &package]);
    for library in ["libtss2*", "*softhsm*", "*opensc*", "p11-kit-*.so"] {
        let found = debian.run(&["find", "/usr/lib", "-name", library]);
        assert_eq!(found, "", "a clean Debian has none");
    }
    let needed = succeed(Command::new("readelf").arg("--dynamic").arg(debian.path("/usr/bin/pintle")));
    let needed: BTreeSet<&str> = needed
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| line.split(['[', ']']).nth(1))
        .filter(|name| !name.starts_with("ld-linux"))
        .collect();
    assert_eq!(needed, BTreeSet::from(["libc.so.6", "libgcc_s.so.1", "libm.so.6"]));
    let output = debian.run(&["pintle", "demo", "--cluster-signing-duration", "6s"]);
    assert!(!output.contains("error:"), "{output}");
}

/// Enrols the installed agent with an API server of this process.
async fn enrol(debian: &Debian, control_plane: &ControlPlane) -> String {
    let kubeconfig = debian.path("/etc/pintle/bootstrap-kubeconfig");
    std::fs::write(kubeconfig, control_plane.bootstrap_kubeconfig()).unwrap();
    let mut command = debian.command(&[
        "setpriv",
        // As in the unit: uid 0 without capabilities.
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--no-new-privs",
        "pintle",
        "run",
        "--once",
        "--node-name=worker-1",
        "--bootstrap-kubeconfig=/etc/pintle/bootstrap-kubeconfig",
    ]);
    tokio::task::spawn_blocking(move || succeed(&mut command)).await.unwrap()
}

async fn control_plane() -> ControlPlane {
    let options = Options {
        approval_delay: Duration::ZERO,
        cluster_signing_duration: Duration::from_secs(3600),
        ..Options::default()
    };
    control_plane::start(options).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_and_certificates_stay_through_upgrade_removal_and_purge() {
    let control_plane = control_plane().await;
    let debian = Debian::new();
    // A node where a kubelet has been running: its files do not belong to the package.
    let pki = debian.path("/var/lib/kubelet/pki");
    std::fs::create_dir_all(&pki).unwrap();
    std::fs::write(pki.join("kubelet.key"), "the kubelet's own serving key").unwrap();
    let before = debian.files(&["/var/lib/kubelet"]);
    let [first, second] = ["1", "2"].map(|version| PACKAGES.put(&debian, "pintle", version));

    let said = debian.run(&["dpkg", "--install", &first]);
    assert!(said.contains("systemctl enable --now pintle.service"), "{said}");
    assert_eq!(debian.files(&["/var/lib/kubelet"]), before, "an installation does not touch what is there");
    debian.run(&["sed", "-i", "s/^#keep-pairs = 2$/keep-pairs = 3/", "/etc/pintle/config.toml"]);
    enrol(&debian, &control_plane).await;
    let kept = debian.files(&KEPT);
    let current = pki.join("kubelet-client-current.pem");
    let keys: Vec<_> = kept.keys().filter(|path| path.starts_with(debian.path("/var/lib/pintle/keys"))).collect();
    assert!(kept.contains_key(&current) && keys.len() > 1, "{:?}", kept.keys());

    debian.run(&["dpkg", "--install", &second]);
    assert_eq!(debian.files(&KEPT), kept, "an upgrade does not touch them");
    let checked = debian.run(&["pintle", "config", "check"]);
    let pairs = checked.lines().find_map(|line| line.strip_prefix("keep-pairs")).map(str::trim);
    assert_eq!(pairs, Some("3"), "nor the configuration");
    // The new version uses them: nothing is due, so it sends no request to the API server.
    let requests = control_plane.certificate_signing_requests().len();
    enrol(&debian, &control_plane).await;
    assert_eq!(control_plane.certificate_signing_requests().len(), requests);
    assert_eq!(std::fs::read_link(&current).unwrap().into_os_string().into_encoded_bytes(), kept[&current].content());

    let kept = debian.files(&KEPT);
    debian.run(&["dpkg", "--remove", "pintle"]);
    assert!(!debian.path("/usr/bin/pintle").exists() && debian.path("/etc/pintle/config.toml").exists());
    assert_eq!(debian.files(&KEPT), kept, "a removal does not touch them");
    let said = debian.run(&["dpkg", "--purge", "pintle"]);
    assert!(!debian.path("/etc/pintle/config.toml").exists());
    assert_eq!(debian.files(&KEPT), kept, "a purge does not touch them");
    assert!(said.contains("/var/lib/pintle") && said.contains("/var/lib/kubelet/pki"), "{said}");
    // A new installation finds the node as it was.
    debian.run(&["dpkg", "--install", &second]);
    enrol(&debian, &control_plane).await;
    assert_eq!(control_plane.certificate_signing_requests().len(), requests);
}

#[test]
fn the_tpm_plugin_brings_its_libraries_and_is_removed_alone() {
    let debian = Debian::new();
    let [agent, plugin] = ["pintle", "pintle-tpm"].map(|name| PACKAGES.put(&debian, name, "1"));
    let refused = output(&mut debian.command(&["dpkg", "--install", &agent, &plugin]));
    assert!(!refused.status.success() && text(&refused).contains("libtss2-esys"), "{}", text(&refused));
    // The missing packages' archives are in apt's cache, so that this needs no network.
    debian.run(&["apt-get", "install", "--yes", "--fix-broken", "--no-download", "--no-install-recommends"]);
    let installed = format!("/usr/lib/pintle/plugins/{PLUGIN}");
    let libraries = debian.run(&["ldd", &installed]);
    assert!(libraries.contains("libtss2-esys.so.0 => /") && !libraries.contains("not found"), "{libraries}");
    let symbols = succeed(Command::new("readelf").args(["--dyn-syms", "--wide"]).arg(debian.path(&installed)));
    assert!(symbols.contains("pintle_backend_v1"), "{symbols}");
    // The unit's drop-in uses a group, without which the service would not start.
    debian.run(&["getent", "group", "tss"]);
    debian.run(&["dpkg", "--purge", "pintle-tpm"]);
    assert!(!debian.path(&installed).exists());
    debian.run(&["pintle", "config", "check"]);
}

/// Checks the system calls of an enrolment against the unit's filter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_makes_no_system_call_that_the_unit_denies() {
    let control_plane = control_plane().await;
    let scratch = ScratchDirectory::new();
    let kubeconfig = scratch.write("bootstrap-kubeconfig", control_plane.bootstrap_kubeconfig());
    let trace = scratch.join("trace");
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o"]).arg(&trace).arg(PINTLE).args(["run", "--once", "--node-name=worker-1"]);
    for (flag, path) in
        [("bootstrap-kubeconfig", kubeconfig), ("cert-dir", scratch.join("pki")), ("state-dir", scratch.join("state"))]
    {
        command.arg(format!("--{flag}={}", path.display()));
    }
    command.arg(format!("--kubeconfig={}", scratch.join("kubeconfig").display()));
    tokio::task::spawn_blocking(move || succeed(&mut command)).await.unwrap();

    let trace = std::fs::read_to_string(trace).unwrap();
    let made: BTreeSet<&str> = trace
        .lines()
        .filter_map(|line| line.split_once(' ')?.1.trim_start().split_once('('))
        .map(|(name, _)| name)
        .filter(|name| {
            name.chars().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_')
        })
        .collect();
    assert!(made.contains("openat") && made.contains("connect"), "{made:?}");
    let allowed = allowed_system_calls();
    let denied: Vec<_> = made.iter().filter(|name| !allowed.contains(**name)).collect();
    assert!(denied.is_empty(), "the unit denies {denied:?}");
    // MemoryDenyWriteExecute=.
    assert!(!trace.contains("PROT_WRITE|PROT_EXEC") && !trace.contains("PROT_READ|PROT_WRITE|PROT_EXEC"));
}

/// The system calls allowed by the unit's SystemCallFilter= lines (systemd.exec(5)).
fn allowed_system_calls() -> BTreeSet<String> {
    let unit = std::fs::read_to_string(repository().join("packaging/systemd/pintle.service")).unwrap();
    let mut allowed = BTreeSet::new();
    for filter in unit.lines().filter_map(|line| line.strip_prefix("SystemCallFilter=")) {
        let denies = filter.starts_with('~');
        for name in filter.trim_start_matches('~').split(' ') {
            let calls = system_calls(name);
            if denies {
                allowed.retain(|call| !calls.contains(call));
            } else {
                allowed.extend(calls);
            }
        }
    }
    allowed
}

/// A system call, or all in a group and its nested groups.
fn system_calls(name: &str) -> BTreeSet<String> {
    if !name.starts_with('@') {
        return BTreeSet::from([name.to_owned()]);
    }
    let output = output(Command::new("systemd-analyze").args(["syscall-filter", name]));
    let listed = String::from_utf8(output.stdout).unwrap();
    let members = listed.lines().filter(|line| line.starts_with(' ')).map(str::trim);
    members.filter(|line| !line.starts_with('#')).flat_map(system_calls).collect()
}
