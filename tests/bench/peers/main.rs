//! Benchmarks pintle's credential proxy against other proxies. Run with `tests/bench/proxy`.
//!
//! Every proxy does the same: it accepts a local connection, over TLS with a client certificate or over a unix
//! socket, and opens one to the common server as the node, with the same key and certificate. Its cost is measured as
//! the CPU time of its processes, which is the most stable figure on a machine with other load. The proxies take
//! turns within each round, and ratios are computed within a round. Nothing is asserted.

mod agent;
mod authority;
mod exact;
mod load;
mod measure;
mod peers;
mod process;
mod server;
mod table;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use agent::{Agent, Identity, LocalSide, Token};
use authority::Authority;
use measure::{Measurement, Workload};
use peers::{Job, Proxy};
use server::KeyExchange;
use table::{GENERAL, PINTLE, PINTLE_HYBRID, PINTLE_OTHER, PINTLE_TOKEN};

/// Set in the process that measures: SoftHSM2 reads its configuration from the environment, which is set for it
/// first.
const DIRECTORY: &str = "PINTLE_BENCH_DIRECTORY";
/// The path of ghostunnel.
const GHOSTUNNEL: &str = "PINTLE_BENCH_GHOSTUNNEL";
/// The path of another pintle for comparison, such as one from before a change.
const OTHER: &str = "PINTLE_BENCH_OTHER";

fn main() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        let directory = tempfile::tempdir().expect("a directory");
        // The workers of a proxy that is started as root may run as another user.
        std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("its mode");
        let status = Command::new(std::env::current_exe().expect("this program"))
            .args(std::env::args_os().skip(1))
            .env(DIRECTORY, directory.path())
            .env("SOFTHSM2_CONF", directory.path().join("softhsm2.conf"))
            .status()
            .expect("this program starts again");
        drop(directory);
        std::process::exit(status.code().unwrap_or(1));
    };
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let workload =
        if arguments.iter().any(|argument| argument == "--quick") { Workload::QUICK } else { Workload::FULL };
    let only: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let mut candidates = candidates(&directory);
    candidates.retain(|(name, _)| only.is_empty() || only.iter().any(|one| one == name));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut measurement = Measurement::new(workload);
    // One at a time, so that no two share the pages of a library.
    for (name, start) in &candidates {
        match start() {
            Some(proxy) => runtime.block_on(measurement.memory_of(&proxy)),
            None => println!("skipped: {name} is not installed"),
        }
    }
    let proxies: Vec<_> = candidates.iter().filter_map(|(_, start)| start()).collect();
    runtime.block_on(measurement.rounds(&proxies));
    println!("{}", measurement.table().print());
    println!("{NOTES}");
}

const NOTES: &str = "\
Medians. CPU is the CPU time of the proxy's own processes. The ratio compares pintle with the best of nginx, haproxy and
stunnel, within a round. All use TLS 1.3 with P-256 certificates, X25519 and AES-128-GCM, without session resumption.
stunnel and ghostunnel have TLS on one side only, so they are not in the first half. `SoftHSM2` is pintle with its key in
a token, including the child process that runs its module; `hybrid` is pintle with a server that uses X25519MLKEM768,
which the others' TLS library does not support. Memory is that of all processes of a proxy that runs alone: resident
(RSS), with shared pages divided among the processes that share them (PSS), and not backed by a file (anonymous). After
all rounds the other proxies are running too, and PSS favours those that share a library.";

/// A name, and a function that starts the proxy if it is installed.
type Candidate = (&'static str, Box<dyn Fn() -> Option<Proxy>>);

/// How to start each proxy. Can be called repeatedly.
fn candidates(directory: &Path) -> Vec<Candidate> {
    let authority = Authority::new();
    let (server, node) = (authority.server(), Rc::new(authority.node()));
    let token = Token::new(directory, &authority);
    let mut clients = vec![node.certificate.clone()];
    clients.extend(token.iter().map(|token| token.identity().certificate.clone()));
    let classic = server::start(&server, clients.clone(), KeyExchange::Classic);
    let hybrid = server::start(&server, clients, KeyExchange::Hybrid);

    let authority_file = directory.join("ca.crt");
    std::fs::write(&authority_file, authority.pem()).expect("a file");
    let local = LocalSide(directory.join("run"));
    let agent = |name, program: PathBuf, server, identity: Identity| {
        let agent =
            Agent::new(name, &program, directory, local.clone(), (authority_file.clone(), server), identity.clone());
        (name, Box::new(move || Some(agent.start())) as Box<dyn Fn() -> Option<Proxy>>)
    };
    let program = || PathBuf::from(env!("CARGO_BIN_EXE_pintle"));
    let mut own = vec![agent(PINTLE, program(), classic, Identity::File(Rc::clone(&node)))];
    match token {
        Some(token) => own.push(agent(PINTLE_TOKEN, program(), classic, Identity::Token(Rc::new(token)))),
        None => println!("skipped: pintle with SoftHSM2, which is not installed"),
    }
    own.push(agent(PINTLE_HYBRID, program(), hybrid, Identity::File(Rc::clone(&node))));
    if let Some(other) = std::env::var_os(OTHER) {
        own.push(agent(PINTLE_OTHER, other.into(), classic, Identity::File(Rc::clone(&node))));
    }

    // The first one creates the local certificates for all.
    drop(own[0].1());
    let (certificate, key) = node.write(directory);
    let local_pair = directory.join("local.pem");
    local.write_pair(&local_pair);
    let job = Rc::new(Job {
        directory: directory.to_owned(),
        server: classic,
        authority: authority_file,
        certificate,
        key,
        local_pair,
        local_authority: local.authority(),
        client: local.client(),
    });
    let ghostunnel = std::env::var_os(GHOSTUNNEL).map(PathBuf::from).unwrap_or_default();
    let peer = |name, start: fn(&Job) -> Option<Proxy>| -> Candidate {
        let job = Rc::clone(&job);
        (name, Box::new(move || start(&job)))
    };
    let mut candidates = vec![
        peer(GENERAL[0], peers::nginx),
        peer(GENERAL[1], peers::haproxy),
        peer(GENERAL[2], peers::stunnel),
        (table::GHOSTUNNEL, Box::new(move || peers::ghostunnel(&job, &ghostunnel))),
    ];
    candidates.append(&mut own);
    candidates
}
