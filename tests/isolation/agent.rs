//! The agent with an isolated backend: it keeps running, reports failures, and recovers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::rc::Rc;
use std::time::Duration;

use pintle::demo::control_plane::{self, ControlPlane};
use pintle::keys::checks::Checks;
use pintle_plugins_api::KeyBackend;
use pintle_test_support::{Agent, AgentCommand, ScratchDirectory, eventually};
use serde_json::Value;

use crate::token::Token;
use crate::{DEADLINE, key};

const PINTLE: &str = env!("CARGO_BIN_EXE_pintle");

/// A node with its own agent, token and control plane.
struct Node {
    scratch: ScratchDirectory,
    token: Rc<Token>,
    configuration: PathBuf,
    environment: BTreeMap<String, String>,
    _control_plane: ControlPlane,
    _runtime: tokio::runtime::Runtime,
}

impl Node {
    fn new() -> Self {
        Self::with_token(&Rc::new(Token::new()))
    }

    /// A node whose token is shared with others.
    fn with_token(token: &Rc<Token>) -> Self {
        let (scratch, token) = (ScratchDirectory::new(), Rc::clone(token));
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let options = control_plane::Options {
            cluster_signing_duration: Duration::from_secs(3600),
            approval_delay: Duration::ZERO,
            ..control_plane::Options::default()
        };
        let control_plane = runtime.block_on(control_plane::start(options)).expect("a control plane");
        let bootstrap = scratch.write("bootstrap", control_plane.bootstrap_kubeconfig());
        let environment: Vec<_> =
            token.environment().into_iter().map(|(name, value)| format!("{name} = {value:?}")).collect();
        let configuration = scratch.write(
            "config.toml",
            format!(
                "node-name = \"worker-1\"\nstate-dir = {state:?}\ncert-dir = {pki:?}\nkubeconfig = {kubeconfig:?}\n\
                 bootstrap-kubeconfig = {bootstrap:?}\n[backends.token]\ntype = \"pkcs11\"\n\
                 uri = \"pkcs11:token=isolated\"\nmodule = {module:?}\npin-file = {pin:?}\n\
                 isolation = {{ environment = {{ {environment} }} }}\n",
                state = scratch.join("state"),
                pki = scratch.join("pki"),
                kubeconfig = scratch.join("kubeconfig"),
                module = Token::faulty_module(),
                pin = token.path("pin"),
                environment = environment.join(", "),
            ),
        );
        Self {
            scratch,
            token,
            configuration,
            environment: BTreeMap::new(),
            _control_plane: control_plane,
            _runtime: runtime,
        }
    }

    /// Loads the module in the agent's process, which then needs the module's environment variables.
    fn without_isolation(&mut self) {
        let text = std::fs::read_to_string(&self.configuration).expect("the configuration");
        let line = text.lines().find(|line| line.starts_with("isolation")).expect("a line");
        self.configuration = self.scratch.write("config.toml", text.replace(line, "isolation = \"none\""));
        self.environment = self.token.environment();
    }

    fn start(&self) -> Agent {
        let command = self
            .environment
            .iter()
            .fold(AgentCommand::new(PINTLE, &self.scratch), |command, (name, value)| command.environment(name, value));
        let agent = command.argument("run").flag("config", &self.configuration).flag("log-format", "json").start();
        eventually("the agent is ready", DEADLINE, || {
            let status = self.status()?;
            (status["identities"][0]["state"] == "ready").then_some(())
        });
        agent
    }

    fn pintle(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(PINTLE);
        command.args(arguments).arg("--config").arg(&self.configuration).envs(&self.environment);
        command.output().expect("pintle starts")
    }

    #[track_caller]
    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.pintle(arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    #[track_caller]
    fn fail(&self, arguments: &[&str]) -> String {
        let output = self.pintle(arguments);
        assert!(!output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    fn status(&self) -> Option<Value> {
        serde_json::from_slice(&self.pintle(&["status", "-o", "json"]).stdout).ok()
    }

    fn backend_in_use(&self) -> String {
        self.status().expect("a status")["identities"][0]["key"]["backend"].as_str().unwrap_or_default().to_owned()
    }
}

#[test]
fn c27_a_rejected_pin_is_tried_once_across_processes() {
    for isolation in ["process", "none"] {
        let mut node = Node::new();
        if isolation == "none" {
            node.without_isolation();
        }
        node.token.write_pin("99999999");
        for command in
            [&["backend", "list"][..], &["keys", "list"], &["backend", "list"], &["backend", "check", "token"]]
        {
            let said = node.fail(command);
            assert!(said.contains("locked"), "{isolation}, {command:?}: {said}");
        }
        assert_eq!(node.token.logins(), 1, "{isolation}");
        // The agent is one of the processes; the commands then ask it.
        let agent = node.start();
        assert!(node.fail(&["backend", "list"]).contains("locked"));
        assert_eq!(node.token.logins(), 1, "{isolation}");
        node.token.write_pin(crate::token::PIN);
        node.succeed(&["backend", "list"]);
        assert_eq!(node.token.logins(), 2, "{isolation}");
        drop(agent);
        node.succeed(&["backend", "list"]);
        let kept = std::fs::read_to_string(node.scratch.join("state/refused-pins.json"));
        assert_eq!(kept.expect("the file"), "[]", "an accepted PIN is removed from the rejected ones");
    }
}

/// What is said about a refused PIN is done to the letter, while an agent runs that was refused it.
#[test]
fn c27_the_hint_ends_a_refusal_whichever_process_was_refused() {
    const NEW: &str = "16180339";
    for (isolation, restarted) in [("process", false), ("process", true), ("none", false), ("none", true)] {
        let mut node = Node::new();
        if isolation == "none" {
            node.without_isolation();
        }
        node.token.write_pin(NEW);
        let mut agent = node.start();
        let said = node.fail(&["backend", "list"]);
        if restarted {
            // That alone is no reason to try again.
            drop(agent);
            agent = node.start();
        }
        node.token.change_pin(NEW);
        let logins = node.token.logins();
        let again = node.fail(&["backend", "list"]);
        assert_eq!(node.token.logins(), logins, "{isolation}, {restarted}");
        let path = |said: &str| {
            let (_, rest) = said.split_once("if the token was changed instead, touch ").expect("what to do then");
            rest.split_whitespace().next().expect("a path").to_owned()
        };
        assert_eq!(path(&said), path(&again), "{isolation}, {restarted}: {said}{again}");
        assert!(Command::new("touch").arg(path(&again)).status().expect("touch runs").success());
        // The module may be initialised anew only now and then.
        eventually("the token lets the agent in", DEADLINE * 2, || {
            node.pintle(&["backend", "list"]).status.success().then_some(())
        });
        drop(agent);
        // SoftHSM shows its token to nobody for a moment while somebody logs in.
        eventually("the token is listed without an agent", DEADLINE, || {
            node.pintle(&["backend", "list"]).status.success().then_some(())
        });
    }
}

#[test]
fn a_key_migrates_to_a_token_and_back_and_a_restart_keeps_its_backend() {
    let node = Node::new();
    let mut agent = node.start();
    assert_eq!(node.backend_in_use(), "file");
    // The installation's part of the name is random.
    let first = node.status().expect("a status")["identities"][0]["key"]["id"].as_str().expect("an id").to_owned();
    let installation = first.strip_prefix("worker-1_client_").and_then(|rest| rest.strip_suffix("_1")).expect("an id");
    let id = |backend: &str, slot: u32| format!("{backend}:worker-1_client_{installation}_{slot}");
    assert!(node.fail(&["migrate", "client", "--to", "nowhere"]).contains("nowhere"));
    assert!(node.fail(&["migrate", "nobody", "--to", "token"]).contains("client"));
    let plan = node.succeed(&["migrate", "client", "--to", "token", "--dry-run"]);
    assert!(plan.contains("would be replaced") && plan.contains(&id("file", 1)), "{plan}");
    assert_eq!(node.backend_in_use(), "file");
    let done = node.succeed(&["migrate", "client", "--to", "token", "--wait"]);
    assert!(done.contains(&id("token", 2)), "{done}");
    assert_eq!(node.backend_in_use(), "token");
    let keys = node.succeed(&["keys", "list"]);
    assert!(
        keys.contains(&format!("{}   ecdsa-p256   in-use", &id("", 2)[1..])) && !keys.contains(&id("", 1)[1..]),
        "{keys}"
    );
    let pair = std::fs::read_to_string(node.scratch.join("pki/kubelet-client-current.pem")).expect("a pair");
    assert!(!pair.contains("PRIVATE KEY"));

    agent.terminate(DEADLINE);
    let mut agent = node.start();
    node.succeed(&["rotate", "--wait"]);
    assert_eq!(node.backend_in_use(), "token");
    assert!(node.succeed(&["migrate", "client", "--to", "token"]).contains("already"));

    node.succeed(&["migrate", "client", "--to", "file", "--wait"]);
    assert_eq!(node.backend_in_use(), "file");
    assert!(node.token.open().list().expect("listed").is_empty(), "the token's keys are destroyed");
    agent.terminate(DEADLINE);
    drop(agent);
    let keys = node.succeed(&["keys", "list"]);
    assert!(keys.contains("in-use"), "without an agent: {keys}");
}

#[test]
fn c15_only_unused_keys_are_pruned() {
    let node = Node::new();
    let mut agent = node.start();
    node.succeed(&["migrate", "client", "--to", "token", "--wait"]);
    let mut backend = node.token.open();
    for id in ["worker-1_client_900", "conformance/x/y", "worker-2_client_1"] {
        key(&mut backend, id);
    }
    let keys = node.succeed(&["keys", "list"]);
    for (id, used) in [("client_900", "unknown"), ("conformance%2Fx%2Fy", "left-over"), ("worker-2", "unknown")] {
        assert!(keys.lines().any(|line| line.contains(id) && line.ends_with(used)), "{id} in {keys}");
    }
    assert!(keys.contains("hint: ") && keys.contains("keys prune BACKEND:ID"), "{keys}");
    assert!(node.succeed(&["keys", "prune"]).contains("nothing to destroy"), "unknown keys are not pruned by default");
    let named = ["keys", "prune", "worker-1_client_900", "token:conformance%2Fx%2Fy"];
    let dry = node.succeed(&[&named[..], &["--dry-run"]].concat());
    assert!(dry.contains("would be destroyed: token:worker-1_client_900 (unknown)"), "{dry}");
    let check = Checks::begin(&node.scratch.join("state"));
    assert!(node.fail(&named).contains("check is under way"), "keys of a running check are not pruned");
    drop(check);
    let held = node.status().expect("a status")["identities"][0]["key"]["id"].as_str().expect("an id").to_owned();
    for name in [&*held, "worker-1_client_901"] {
        let refused = node.fail(&["keys", "prune", "worker-1_client_900", name]);
        assert!(refused.contains("nothing to destroy") && refused.contains("hint: "), "{name}: {refused}");
    }
    assert_eq!(backend.list().expect("listed").len(), 4);
    // Two private and public objects per key, in one session: this process has another one.
    assert!(keys.contains("\n  token: objects 8, sessions 1\n") && keys.contains("\n  file: files 0\n"), "{keys}");
    let pruned = node.succeed(&named);
    let (shown, done) = pruned.split_at(pruned.find("destroyed: ").expect("some are destroyed"));
    assert!(shown.contains("ecdsa-p256   unknown") && shown.contains("left-over"), "{pruned}");
    assert_eq!(done.lines().filter(|line| line.starts_with("destroyed: token:")).count(), 2, "{pruned}");
    assert!(done.ends_with("\n  freed in token: objects 4\n") && done.lines().count() == 3, "{pruned}");
    let left: Vec<_> = backend.list().expect("listed").iter().map(ToString::to_string).collect();
    assert!(left.len() == 2 && left.contains(&held), "{left:?}");
    // The same without an agent.
    key(&mut backend, "worker-1_client_901");
    agent.terminate(DEADLINE);
    assert!(node.fail(&["keys", "prune", &held]).contains("in-use"));
    assert!(node.succeed(&["keys", "prune", "worker-1_client_901"]).contains("destroyed: token:worker-1_client_901"));
    assert_eq!(backend.list().expect("listed").len(), 2);
}

#[test]
fn c33_nodes_with_the_same_name_in_two_clusters_do_not_delete_each_others_keys() {
    let token = Rc::new(Token::new());
    let nodes = [Node::with_token(&token), Node::with_token(&token)];
    let mut agents: Vec<Agent> = nodes.iter().map(Node::start).collect();
    // One node's keys had other numbers before they were in the token.
    nodes[1].succeed(&["rotate", "--wait"]);
    let held = |node: &Node| {
        node.succeed(&["migrate", "client", "--to", "token", "--wait"]);
        node.status().expect("a status")["identities"][0]["key"]["id"].as_str().expect("an id").to_owned()
    };
    let ids = nodes.each_ref().map(held);
    assert_ne!(ids[0], ids[1]);
    let both_keys_are_there = || {
        let found: Vec<_> = token.open().list().expect("listed").iter().map(ToString::to_string).collect();
        assert!(found.len() == 2 && ids.iter().all(|id| found.contains(id)), "{found:?}");
    };
    let used = |node: &Node| {
        let keys: Value = serde_json::from_str(&node.succeed(&["keys", "list", "--json"])).expect("JSON");
        let used = |id: &String| {
            let key = keys["keys"].as_array()?.iter().find(|key| key["id"] == **id)?;
            key["use"].as_str().map(str::to_owned)
        };
        ids.each_ref().map(|id| used(id).unwrap_or_default())
    };
    for running in [true, false] {
        assert_eq!(used(&nodes[0]), ["in-use", "unknown"], "running: {running}");
        assert_eq!(used(&nodes[1]), ["unknown", "in-use"], "running: {running}");
        for (number, node) in nodes.iter().enumerate() {
            assert!(node.succeed(&["keys", "prune"]).contains("nothing to destroy"), "running: {running}");
            assert!(node.fail(&["keys", "prune", &ids[number]]).contains("in-use"), "running: {running}");
        }
        both_keys_are_there();
        for agent in &mut agents {
            agent.terminate(DEADLINE);
        }
        agents.clear();
    }
    // An operator who knows that the other node is gone.
    let pruned = nodes[0].succeed(&["keys", "prune", &ids[1]]);
    assert!(pruned.contains(&format!("destroyed: token:{} (unknown)", ids[1])), "{pruned}");
    assert_eq!(used(&nodes[0]), ["in-use", ""]);
}

#[test]
fn c25_the_agent_survives_a_crash_of_its_module_and_reports_it() {
    let node = Node::new();
    let mut agent = node.start();
    node.succeed(&["migrate", "client", "--to", "token", "--wait"]);
    node.token.fault("after-generate", "segfault");
    let failure = node.fail(&["rotate", "--wait"]);
    assert!(failure.contains("SIGSEGV") && failure.contains("in generate"), "{failure}");
    let status = String::from_utf8_lossy(&node.pintle(&["status"]).stdout).into_owned();
    assert!(status.contains("backend token: ") && status.contains("SIGSEGV"), "{status}");
    agent.process().assert_running();
    agent.wait_for_log("the log reports it", DEADLINE, |line| line["event"] == "backend_down");
    node.token.clear_fault();
    eventually("the rotation continues by itself", Duration::from_secs(60), || {
        let status = node.status()?;
        (status["identities"][0]["rotations"].as_u64()? >= 3).then_some(())
    });
    agent.wait_for_log("the log reports the recovery", DEADLINE, |line| line["event"] == "backend_up");
    eventually("the old key is gone", DEADLINE, || (node.token.open().list().ok()?.len() == 1).then_some(()));
    let table = node.succeed(&["backend", "list"]);
    assert!(table.ends_with("\n  file: files 0\n  token: objects 2, sessions 1\n"), "{table}");
    let json: Value = serde_json::from_str(&node.succeed(&["backend", "list", "--json"])).expect("JSON");
    let usage = serde_json::json!([{"name": "objects", "used": 2, "limit": null},
                                   {"name": "sessions", "used": 1, "limit": null}]);
    assert_eq!(json[1]["usage"], usage, "{json}");
    assert!(
        table.lines().any(|line| line.starts_with("token   pkcs11   process     up") && line.ends_with("yes")),
        "{table}"
    );
}

#[test]
fn backend_check_leaves_the_device_unchanged() {
    let node = Node::new();
    let report = node.succeed(&["backend", "check", "token"]);
    assert!(report.contains("LATENCY") && report.contains(" 0 failed"), "{report}");
    assert!(node.token.open().list().expect("listed").is_empty());
    assert!(node.fail(&["backend", "check", "nothing"]).contains("nothing"));
    // The report for a module that cannot be loaded does not mention algorithms.
    let module = node.scratch.write("module.so", "");
    let content = std::fs::read_to_string(&node.configuration).expect("the configuration");
    std::fs::write(
        &node.configuration,
        content.replace(&*Token::faulty_module().to_string_lossy(), &module.to_string_lossy()),
    )
    .expect("written");
    let words = node.fail(&["backend", "check", "token"]);
    assert!(words.contains("module.so is not") && words.contains("hint: "), "{words}");
}
