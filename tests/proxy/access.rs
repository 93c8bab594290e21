//! Which clients can use the identity.

use std::process::Command;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::bed::{ApiServer, Authority, Bed, until};
use crate::client::get_over;

/// The result of a connection with this TLS configuration: the server may reject it only after the client's
/// handshake.
async fn outcome(bed: &Bed, config: rustls::ClientConfig) -> std::io::Result<String> {
    let mut stream = bed.connect_with(config).await?;
    get_over(&mut stream, "/whoami").await
}

#[tokio::test(flavor = "multi_thread")]
async fn c18_only_this_boots_local_certificate_is_accepted_and_other_clients_cause_no_signature() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let server = ApiServer::start(&authority).await;
    let epoch = authority.epoch("node", &authority.upstream(&[server.address]));
    let bed = Bed::start(Some(epoch), |_, _| {}).await;
    let mut events = bed.telemetry.events();

    let refused = outcome(&bed, bed.client_config_with(&["http/1.1"], None)).await.unwrap_err();
    assert!(refused.to_string().contains("CertificateRequired"), "{refused}");
    let key = stranger.certified_key("stranger");
    let mut config = bed.client_config_with(&["h2", "http/1.1"], None);
    config.client_auth_cert_resolver = std::sync::Arc::new(pintle::keys::HeldCertificate(key));
    for _ in 0..3 {
        let refused = outcome(&bed, config.clone()).await.unwrap_err();
        assert!(refused.to_string().contains("UnknownCA"), "{refused}");
    }
    until("both are counted", || bed.failures("local-certificate-unknown") == 3).await;
    assert_eq!(bed.failures("local-certificate-missing"), 1);
    let mut lines = 0;
    while let Ok(event) = events.try_recv() {
        lines += usize::from(matches!(event.event, pintle::telemetry::Event::ProxyFailed { .. }));
    }
    assert_eq!(lines, 2, "one line per reason");
    // The server was asked for its protocol, without the node certificate.
    assert_eq!(server.seen.connections.load(std::sync::atomic::Ordering::Relaxed), 0);
    assert_eq!(bed.statistics().server_handshakes, 0);
    assert_eq!(bed.get("/whoami").await.unwrap(), "node");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unusual_alpn_offer_fails_only_that_client_and_evicts_no_cached_protocol() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let second = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = authority.upstream(&[server.address, second.local_addr().unwrap()]);
    let bed = Bed::start(Some(authority.epoch("node", &upstream)), |_, _| {}).await;
    assert_eq!(bed.get("/whoami").await.unwrap(), "node");
    let refused = outcome(&bed, bed.client_config_with(&["bogus"], None)).await.unwrap_err();
    assert!(refused.to_string().contains("NoApplicationProtocol"), "{refused}");
    until("it is counted", || bed.failures("local-handshake") == 1).await;
    assert_eq!(bed.statistics().failures.len(), 1);
    let other = tokio::time::timeout(Duration::from_millis(100), second.accept()).await;
    assert!(other.is_err(), "no other API server is asked");

    let asked = || server.seen.anonymous.load(std::sync::atomic::Ordering::Relaxed);
    let before = asked();
    for number in 0..20 {
        let odd = format!("odd-{number}");
        outcome(&bed, bed.client_config_with(&["http/1.1", &odd], None)).await.unwrap_err();
    }
    until("the server was asked each time", || asked() == before + 20).await;
    assert_eq!(bed.get("/whoami").await.unwrap(), "node");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(asked(), before + 20, "the first client's offer is still cached");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_local_certificate_survives_a_restart_but_not_a_reboot() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let first = Bed::start(Some(authority.epoch("node", &upstream)), |_, _| {}).await;
    let before = first.client_config(&["http/1.1"]);
    let runtime = first.directory.path().join("client");
    let restart = |runtime: std::path::PathBuf| {
        let epoch = authority.epoch("node", &upstream);
        Bed::start(Some(epoch), move |configuration, directory| {
            // The other proxy's files, as after a restart.
            let copy = directory.path().join("client");
            assert!(Command::new("cp").arg("-a").arg(runtime).arg(&copy).status().unwrap().success());
            configuration.runtime_directory = copy;
        })
    };
    let second = restart(runtime.clone()).await;
    assert_eq!(outcome(&second, before.clone()).await.unwrap(), "node");

    // Make the files look like those of an earlier boot.
    let listener = runtime.join("listener.pem");
    let text = std::fs::read_to_string(&listener).unwrap();
    let (line, rest) = text.split_once('\n').unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert!(line.contains(boot.trim()));
    std::fs::write(&listener, format!("{}\n{rest}", line.replace(boot.trim(), "another"))).unwrap();
    let third = restart(runtime).await;
    let refused = outcome(&third, before.clone()).await.unwrap_err();
    assert!(refused.to_string().contains("UnknownIssuer") || refused.to_string().contains("BadSignature"), "{refused}");
    // The old certificate with the new listener, for a client that does not verify the server.
    let old = first.directory.path().join("client");
    let pair = (
        CertificateDer::from_pem_file(old.join("client.crt")).unwrap(),
        PrivateKeyDer::from_pem_file(old.join("client.key")).unwrap(),
    );
    let refused = outcome(&third, third.client_config_with(&["http/1.1"], Some(pair))).await.unwrap_err();
    assert!(refused.to_string().contains("UnknownCA"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubeconfig_does_not_work_on_another_machine() {
    if !rustix::process::getuid().is_root() {
        return; // Only root can create a network namespace to act as another machine.
    }
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let epoch = authority.epoch("node", &authority.upstream(&[server.address]));
    let bed = Bed::start(Some(epoch), |_, _| {}).await;
    let kubeconfig = std::fs::read_to_string(bed.kubeconfig()).unwrap();
    assert!(kubeconfig.contains("server: https://127.0.0.1:"), "{kubeconfig}");
    assert!(!kubeconfig.contains("-data") && !kubeconfig.contains("PRIVATE"), "{kubeconfig}");

    // Together with the files that it refers to.
    let elsewhere = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-a").arg(bed.file("")).arg(elsewhere.path().join("client")).status();
    assert!(copied.unwrap().success());
    let [here, there] = [bed.directory.path(), elsewhere.path()].map(|path| path.display().to_string());
    let stolen = elsewhere.path().join("kubeconfig");
    std::fs::write(&stolen, kubeconfig.replace(&here, &there)).unwrap();
    let kubectl = pintle_test_support::kubectl();
    let ask = |machine: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec {machine} \"$@\""), "sh"]).arg(kubectl.get_program());
        command.args(["kubectl", "get", "--raw", "/whoami", "--kubeconfig"]).arg(&stolen);
        tokio::task::block_in_place(|| command.output().unwrap())
    };
    let of_another = ask("unshare --net sh -c 'ip link set lo up; exec \"$@\"' sh");
    let words = String::from_utf8_lossy(&of_another.stderr);
    assert!(!of_another.status.success() && words.contains("127.0.0.1"), "{words}");
    assert!(words.contains("refused") || words.contains("unreachable"), "{words}");
    assert_eq!((bed.statistics().accepted, server.requests()), (0, 0));
    let here = ask("");
    assert_eq!(String::from_utf8_lossy(&here.stdout), "node", "{}", String::from_utf8_lossy(&here.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_user_can_neither_read_the_key_nor_use_the_unix_socket() {
    if !rustix::process::getuid().is_root() {
        return; // Only root can switch to another user.
    }
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let epoch = authority.epoch("node", &authority.upstream(&[server.address]));
    let bed = Bed::start(Some(epoch), |configuration, directory| {
        configuration.unix_socket = Some(directory.path().join("proxy.sock"));
    })
    .await;
    let socket = bed.directory.path().join("proxy.sock");
    let as_nobody = |program: &str, arguments: &[&std::ffi::OsStr]| {
        Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", program])
            .args(arguments)
            .output()
            .unwrap()
    };
    for secret in ["client.key", "client.crt", "listener.pem"] {
        let output = as_nobody("cat", &[bed.file(secret).as_os_str()]);
        assert!(!output.status.success() && output.stdout.is_empty(), "{secret}");
    }
    assert!(as_nobody("cat", &[bed.file("ca.crt").as_os_str()]).status.success());
    let script = "use IO::Socket::UNIX; my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or exit 2; \
                  print $s \"GET / HTTP/1.1\\r\\n\\r\\n\"; $s->flush; exit(defined(<$s>) ? 0 : 3)";
    let connect = || as_nobody("perl", &["-e".as_ref(), script.as_ref(), socket.as_os_str()]);
    assert_eq!(connect().status.code(), Some(2), "the socket's mode denies access");
    // Even if the mode allowed it:
    std::fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let output = tokio::task::block_in_place(connect);
    assert_ne!(output.status.code(), Some(0));
    until("it is counted", || bed.failures("peer-not-allowed") == 1).await;

    let mut stream = UnixStream::connect(&socket).await.unwrap();
    assert_eq!(get_over(&mut stream, "/whoami").await.unwrap(), "node");
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_works_over_a_unix_socket() {
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let epoch = authority.epoch("node", &authority.upstream(&[server.address]));
    let bed = Bed::start(Some(epoch), |configuration, directory| {
        configuration.unix_socket = Some(directory.path().join("proxy.sock"));
    })
    .await;
    let mut stream = UnixStream::connect(bed.directory.path().join("proxy.sock")).await.unwrap();
    stream.write_all(b"PRI * HT").await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    stream.write_all(b"TP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut header = [0; 9];
    stream.read_exact(&mut header).await.unwrap();
    assert_eq!(header[3], 4, "the server's SETTINGS");
}
