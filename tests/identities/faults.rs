//! What happens to one identity is not the other's trouble: two of them in one process, one with its key in a file and
//! one with its key in a token, against the real control plane, with certificates that live for seconds.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use pintle_test_support::{
    Agent, AgentCommand, BootstrapCredential, ControlPlane, Options, Token, TokenModule, faulty_module,
};
use serde_json::Value;

use super::Machine;
use super::interceptor::Interceptor;

/// How often each rotates before one of them is hurt: in one test many times, and in the others a few.
const ROTATIONS: usize = 10;
const FEW_ROTATIONS: usize = 2;
/// How often the other one rotates while one is hurt.
const MEANWHILE: usize = 4;
/// A certificate is rotated after eleven to fourteen of its fifteen seconds.
const LIFE: &str = "15s";
const DEADLINE: Duration = Duration::from_secs(600);
const FILE: &str = "kubelet";
const TOKEN: &str = "probe";

static SHARED: LazyLock<ControlPlane> =
    LazyLock::new(|| ControlPlane::start(Options { cluster_signing_duration: LIFE.into(), ..Options::default() }));

/// A node with both identities, and a way to the API server for each.
struct Bed {
    machine: Machine,
    token: Token,
    file_way: Interceptor,
}

impl Bed {
    fn new(node: &str) -> Self {
        let mut machine = Machine::new();
        let module = faulty_module(Path::new(env!("CARGO_TARGET_TMPDIR")));
        let token = Token::new(TokenModule::SoftHsm, machine.scratch.join("token")).behind(module);
        machine.set_environment(token.environment());
        let server = SHARED.server_url().trim_start_matches("https://").parse().expect("an address");
        let file_way = Interceptor::start(server, &SHARED.authority().issue_server("in-between"));
        for (name, url) in [(FILE, file_way.url()), (TOKEN, SHARED.server_url().to_owned())] {
            let kubeconfig = SHARED.bootstrap_kubeconfig(BootstrapCredential::SecretToken);
            let kubeconfig = fs::read_to_string(kubeconfig).expect("readable");
            let _ = machine.scratch.write(format!("{name}-bootstrap"), kubeconfig.replace(SHARED.server_url(), &url));
        }
        let identity = |name: &str, backend: &str| {
            format!(
                "[[identity]]\nname = \"{name}\"\nbackend = \"{backend}\"\ncert-dir = \"$DIR/{name}\"\n\
                 kubeconfig = \"$DIR/{name}.conf\"\nbootstrap-kubeconfig = \"$DIR/{name}-bootstrap\"\n"
            )
        };
        let identities = [identity(FILE, "file"), identity(TOKEN, "token")].concat();
        machine.configure(node, &format!("[backends.token]\n{}\n{identities}", token.table()));
        Self { machine, token, file_way }
    }

    /// Both rotate; then `hurt` hurts `hurt_one` until the other has rotated some more, and `mend` ends it.
    #[track_caller]
    fn other_misses_nothing(
        &self,
        command: AgentCommand,
        rotations: usize,
        hurt_one: &str,
        words: &[&str],
        hurt: impl FnOnce(&mut Agent),
        mend: impl FnOnce(&mut Agent),
    ) {
        let other = if hurt_one == FILE { TOKEN } else { FILE };
        let mut agent = command.start();
        for name in [FILE, TOKEN] {
            wait_for_holdings(&mut agent, name, rotations + 1);
        }
        assert_no_rotation_missed(&agent, hurt_one, rotations);

        hurt(&mut agent);
        let reason = agent.wait_for("the status names the one that is hurt", DEADLINE, |_| {
            let reason = self.machine.status(hurt_one)["reason"].as_str()?.to_owned();
            words.iter().any(|word| reason.contains(word)).then_some(reason)
        });
        let (at_first, hurt_at_first) = (holdings(&agent, other), holdings(&agent, hurt_one));
        wait_for_holdings(&mut agent, other, at_first + MEANWHILE);
        assert_eq!(holdings(&agent, hurt_one), hurt_at_first, "it cannot rotate: {reason}");
        let status = self.machine.status(hurt_one);
        assert_ne!(status["state"], "ready", "{status}");
        assert_eq!(self.machine.status(other)["reason"], "", "the other has no trouble");
        assert_eq!(self.machine.run(&["status"]).code, Some(1), "the node is not well");

        mend(&mut agent);
        wait_for_holdings(&mut agent, hurt_one, hurt_at_first + 2);
        agent.wait_for("both are well", DEADLINE, |_| {
            [FILE, TOKEN].iter().all(|name| self.machine.status(name)["reason"] == "").then_some(())
        });
        assert_no_rotation_missed(&agent, other, rotations + MEANWHILE);
        assert!(agent.terminate(DEADLINE).success());
    }
}

/// The log lines of this event and identity.
fn events(agent: &Agent, identity: &str, event: &str) -> Vec<Value> {
    agent.log().into_iter().filter(|line| line["event"] == event && line["identity"] == identity).collect()
}

/// How many certificates an identity has come to hold.
fn holdings(agent: &Agent, identity: &str) -> usize {
    events(agent, identity, "holding").len()
}

#[track_caller]
fn wait_for_holdings(agent: &mut Agent, identity: &str, count: usize) {
    let what = format!("{identity} holds its certificate number {count}");
    agent.wait_for(&what, DEADLINE, |agent| (holdings(agent, identity) >= count).then_some(()));
}

/// There were so many rotations; by the log's own times each pair was published before the one before had expired, and nothing failed on the way.
#[track_caller]
fn assert_no_rotation_missed(agent: &Agent, identity: &str, rotations: usize) {
    let time = |text: &Value| -> SystemTime {
        text.as_str().unwrap_or_default().parse::<jiff::Timestamp>().expect("RFC 3339").into()
    };
    let (issued, published) =
        (events(agent, identity, "certificate_issued"), events(agent, identity, "pair_published"));
    assert!(published.len() > rotations, "{published:?}");
    for (before, next) in issued.iter().zip(published.iter().skip(1)) {
        assert!(time(&next["time"]) < time(&before["not_after"]), "{identity} came too late: {before} {next}");
    }
    let failed = events(agent, identity, "failed");
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn a_backend_that_hangs_costs_the_other_no_rotation() {
    let bed = Bed::new("hanging");
    let hurt = |_: &mut Agent| bed.token.fault("sign hang");
    bed.other_misses_nothing(bed.machine.agent(), ROTATIONS, TOKEN, &["did not answer"], hurt, |_| bed.token.mend());
}

#[test]
fn an_api_server_that_answers_garbage_costs_the_other_no_rotation() {
    let bed = Bed::new("garbled");
    let hurt = |_: &mut Agent| bed.file_way.garble(true);
    let mend = |_: &mut Agent| {
        assert!(bed.file_way.answered() > 0, "no request was answered with garbage");
        bed.file_way.garble(false);
    };
    bed.other_misses_nothing(bed.machine.agent(), FEW_ROTATIONS, FILE, &["API server"], hurt, mend);
}

#[test]
fn a_full_disk_costs_the_other_no_rotation() {
    let bed = Bed::new("full");
    // As the agent sees it.
    let filler = |agent: &mut Agent| -> PathBuf {
        let directory = bed.machine.scratch.join(FILE);
        let root = PathBuf::from(format!("/proc/{}/root", agent.process().id()));
        root.join(directory.strip_prefix("/").expect("absolute")).join("filler")
    };
    let hurt = |agent: &mut Agent| {
        let mut file = fs::File::create(filler(agent)).expect("created");
        while file.write_all(&[1; 512]).is_ok() {}
    };
    let mend = |agent: &mut Agent| fs::remove_file(filler(agent)).expect("removed");
    let command = bed.machine.agent_with_small_disk(FILE);
    bed.other_misses_nothing(command, FEW_ROTATIONS, FILE, &["cannot be written"], hurt, mend);
}
