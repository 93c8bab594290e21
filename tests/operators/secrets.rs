//! What operators are shown holds no secret.

use pintle_test_support::{Agent, Node};

use crate::embedded::{DEADLINE, Embedded};
use crate::{HOUR, new_node, read, wait_until_holding};

#[test]
fn neither_log_nor_journal_holds_a_secret() {
    let control_plane = Embedded::signing_for(8);
    let node = new_node("secrets");
    let bootstrap = control_plane.bootstrap_kubeconfig();
    let token = bootstrap.lines().find_map(|line| line.trim().strip_prefix("token: ")).expect("a token");
    let token = token.trim_matches('"').to_owned();
    let wrong = format!("{}ffffffffffffffff", &token[..7]);
    node.give_bootstrap(bootstrap.replace(&token, &wrong));
    let mut agent = node.agent().start();
    agent.wait_for_log("it is refused", DEADLINE, |line| line["event"] == "failed");
    node.give_bootstrap(bootstrap);
    let first = wait_until_holding(&mut agent);
    agent.wait_for_log("a rotation", DEADLINE, |line| line["event"] == "holding" && line["serial"] != first["serial"]);

    assert_no_secret(&node, &mut agent, &[&token, &token[7..], &wrong, "PRIVATE KEY"]);
}

/// What the makers of kube, of a YAML parser and of an exec plugin say of an error may quote what it is about.
#[test]
fn what_is_wrong_with_a_bootstrap_kubeconfig_is_said_without_its_secrets() {
    let control_plane = Embedded::signing_for(HOUR);
    let bootstrap = control_plane.bootstrap_kubeconfig();
    let line = bootstrap.lines().find(|line| line.trim().starts_with("token: ")).expect("a token");
    let token = line.trim().trim_start_matches("token: ").trim_matches('"').to_owned();
    let indent = &line[..line.len() - line.trim_start().len()];
    let user = |lines: &[&str]| {
        let lines: Vec<_> = lines.iter().map(|line| format!("{indent}{line}")).collect();
        bootstrap.replace(line, &lines.join("\n"))
    };
    let script = |script: &str| {
        let exec = "exec: {apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: sh,";
        let environment = "env: [{name: SECRET, value: hunter2-environment}],";
        user(&[exec, environment, &format!("args: [-c, '{script}', hunter2-argument]}}")])
    };
    let proxy = bootstrap.replace("server: ", "proxy-url: ftp://user:hunter2@proxy\n    server: ");
    for (name, kubeconfig, words) in [
        ("tab", bootstrap.replace(line, &format!("{line}\n\tx: y")), "line "),
        ("key-list", user(&["client-key-data: [hunter2]"]), "its user: invalid type"),
        ("key", user(&["client-certificate-data: eA==", "client-key-data: hunter2-"]), "not valid base64"),
        ("exec-fails", script("echo hunter2-output; echo hunter2-error >&2; exit 3"), "sh failed: exit status: 3"),
        ("exec-no-json", script("echo hunter2: hunter2: hunter2"), "no ExecCredential"),
        ("proxy", proxy, "the proxy ftp://proxy from proxy-url is"),
    ] {
        let node = new_node(name);
        node.give_bootstrap(kubeconfig);
        let mut agent = node.agent().start();
        let failed = agent.wait_for_log("it cannot be used", DEADLINE, |line| line["event"] == "failed");
        assert!(failed["reason"].as_str().is_some_and(|reason| reason.contains(words)), "{name}: {failed}");
        assert_no_secret(&node, &mut agent, &[&token, &token[7..], "hunter2"]);
        agent.kill();
    }
}

/// Looks for secrets wherever an agent shows something.
fn assert_no_secret(node: &Node, agent: &mut Agent, secrets: &[&str]) {
    let argv = std::fs::read(format!("/proc/{}/cmdline", agent.process().id())).expect("it runs");
    let status = node.run(&["status", "-o", "yaml"]).output;
    let mut texts = vec![("argv", String::from_utf8_lossy(&argv).into_owned()), ("status", status)];
    for path in [node.scratch().join("agent.log"), node.journal()] {
        texts.push(("file", read(&path)));
    }
    for (what, text) in texts {
        assert!(!text.is_empty(), "{what}");
        for secret in secrets {
            assert!(!text.contains(secret), "{secret} in {what}: {text}");
        }
    }
}
