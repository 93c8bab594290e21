//! Prometheus metrics, computed from the status at each scrape.
//!
//! The kubelet's own metric names come first, so that alerts on a kubelet's rotation keep working; the others are
//! pintle's. Names and labels are an interface. Label values are few: never a serial number or a path.

use pintle_agent_core::UnixTime;
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder, TextEncoder};

use super::{FailureReason, IdentityStatus, ProxyStatus, Status};

/// The media type of [`text`]: Prometheus' text exposition format.
pub const MEDIA_TYPE: &str = prometheus::TEXT_FORMAT;

/// The metrics in Prometheus' text exposition format.
pub fn text(status: &Status, now: UnixTime) -> String {
    let mut page = Page::default();
    page.of_kubelet(&status.identities, now);
    for identity in &status.identities {
        page.identity(identity, now);
    }
    for backend in &status.backends {
        page.gauge(
            "pintle_backend_up",
            "Whether a key backend's device answered the last call",
            &[("backend", &backend.name)],
            f64::from(u8::from(backend.up)),
        );
    }
    let mut text = Vec::new();
    // Encoding fails only for a family without metrics, and there is none.
    let _ = TextEncoder::new().encode(&page.families, &mut text);
    String::from_utf8(text).unwrap_or_default()
}

/// Metric families, in the order in which they were first added.
#[derive(Default)]
struct Page {
    families: Vec<MetricFamily>,
}

impl Page {
    /// The kubelet's own metrics, which assume a single client certificate: of several, the one that expires first.
    fn of_kubelet(&mut self, identities: &[IdentityStatus], now: UnixTime) {
        let now = now.as_milliseconds() as f64 / 1000.0;
        if let Some(end) = identities.iter().filter_map(|identity| identity.not_after).min() {
            self.gauge(
                "kubelet_certificate_manager_client_ttl_seconds",
                "Time until the client certificate expires; negative afterwards",
                &[],
                (seconds(end) - now).floor(),
            );
        }
        self.counter(
            "kubelet_certificate_manager_client_expiration_renew_errors",
            "Failures in renewing the client certificate",
            &[],
            identities.iter().map(|identity| identity.errors).sum(),
        );
    }

    fn identity(&mut self, identity: &IdentityStatus, now: UnixTime) {
        let good = identity.is_good(now);
        let of_identity = [("identity", identity.identity.as_str())];
        let now = now.as_milliseconds() as f64 / 1000.0;
        let (end, due) = (identity.not_after.map(seconds), identity.rotates_at.map(seconds));
        if let Some(end) = end {
            self.gauge(
                "pintle_certificate_not_after_timestamp_seconds",
                "When the certificate expires, Unix time",
                &of_identity,
                end,
            );
        }
        if let Some(due) = due {
            self.gauge(
                "pintle_certificate_renewal_timestamp_seconds",
                "When the rotation is scheduled, Unix time",
                &of_identity,
                due,
            );
        }
        self.gauge(
            "pintle_certificate_ready_status",
            "Whether an unexpired certificate with an available key is in use",
            &of_identity,
            f64::from(u8::from(good)),
        );
        self.gauge(
            "pintle_rotation_overdue_seconds",
            "How long the rotation is overdue, whether or not it was attempted",
            &of_identity,
            due.map_or(0.0, |due| now - due).max(0.0).floor(),
        );
        for (result, count) in [("success", identity.rotations), ("failure", identity.errors)] {
            self.counter(
                "pintle_rotations_total",
                "Completed rotations, and failures during rotations",
                &[of_identity[0], ("result", result)],
                count,
            );
        }
        if let Some(proxy) = &identity.proxy {
            self.proxy(of_identity[0], proxy);
        }
    }

    fn proxy(&mut self, identity: (&str, &str), proxy: &ProxyStatus) {
        let statistics = &proxy.statistics;
        let current = statistics.open_connections.get(&proxy.serial).copied().unwrap_or_default();
        let earlier = statistics.open_connections.values().sum::<u64>() - current;
        for (certificate, count) in [("current", current), ("earlier", earlier)] {
            self.gauge(
                "pintle_proxy_connections",
                "Open connections through the credential proxy, by certificate",
                &[identity, ("certificate", certificate)],
                count as f64,
            );
        }
        self.counter(
            "pintle_proxy_accepted_total",
            "Local connections accepted by the credential proxy",
            &[identity],
            statistics.accepted,
        );
        for (side, count) in [("local", statistics.local_handshakes), ("server", statistics.server_handshakes)] {
            self.counter(
                "pintle_proxy_handshakes_total",
                "Handshakes of the credential proxy with local clients and with API servers",
                &[identity, ("side", side)],
                count,
            );
        }
        for (to, count) in [("server", statistics.bytes_to_server), ("client", statistics.bytes_to_client)] {
            self.counter(
                "pintle_proxy_bytes_total",
                "Bytes relayed by the credential proxy, by direction",
                &[identity, ("to", to)],
                count,
            );
        }
        // Every reason from the start, so that rate() sees the first failure.
        for reason in FailureReason::ALL {
            self.counter(
                "pintle_proxy_failures_total",
                "Connections through the credential proxy that failed, by reason",
                &[identity, ("reason", reason.word())],
                statistics.failures.get(reason.word()).copied().unwrap_or_default(),
            );
        }
    }

    fn gauge(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: f64) {
        let mut gauge = Gauge::default();
        gauge.set_value(value);
        let mut metric = Metric::default();
        metric.set_gauge(gauge);
        self.add(name, help, MetricType::GAUGE, labels, metric);
    }

    fn counter(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: u64) {
        let mut counter = Counter::default();
        counter.set_value(value as f64);
        let mut metric = Metric::default();
        metric.set_counter(counter);
        self.add(name, help, MetricType::COUNTER, labels, metric);
    }

    fn add(&mut self, name: &str, help: &str, kind: MetricType, labels: &[(&str, &str)], mut metric: Metric) {
        let label = |(name, value): &(&str, &str)| {
            let mut label = LabelPair::default();
            label.set_name((*name).to_owned());
            label.set_value((*value).to_owned());
            label
        };
        metric.set_label(labels.iter().map(label).collect());
        if let Some(family) = self.families.iter_mut().find(|family| family.name() == name) {
            return family.mut_metric().push(metric);
        }
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(vec![metric]);
        self.families.push(family);
    }
}

fn seconds(time: UnixTime) -> f64 {
    time.as_seconds() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{BackendStatus, Statistics};

    fn status() -> Status {
        let statistics = Statistics {
            open_connections: [("A1".to_owned(), 2), ("B2".to_owned(), 5)].into(),
            failures: [("cut-at-end".to_owned(), 1)].into(),
            ..Statistics::default()
        };
        let proxy = ProxyStatus {
            address: ([127, 0, 0, 1], 6444).into(),
            serial: "B2".to_owned(),
            reason: String::new(),
            statistics,
        };
        let identity = IdentityStatus {
            identity: "client".to_owned(),
            not_after: Some(UnixTime::from_seconds(100)),
            rotates_at: Some(UnixTime::from_seconds(80)),
            rotations: 3,
            errors: 2,
            proxy: Some(proxy),
            ..IdentityStatus::default()
        };
        let backends = vec![BackendStatus { name: "token".to_owned(), ..BackendStatus::default() }];
        Status { identities: vec![identity], backends }
    }

    /// The names are an interface: change this list and docs/operators.md together with them.
    #[test]
    fn names_and_labels_are_stable_and_documented() {
        let text = text(&status(), UnixTime::from_seconds(110));
        for line in [
            "kubelet_certificate_manager_client_ttl_seconds -10",
            "kubelet_certificate_manager_client_expiration_renew_errors 2",
            "pintle_certificate_not_after_timestamp_seconds{identity=\"client\"} 100",
            "pintle_certificate_renewal_timestamp_seconds{identity=\"client\"} 80",
            "pintle_certificate_ready_status{identity=\"client\"} 0",
            "pintle_rotation_overdue_seconds{identity=\"client\"} 30",
            "pintle_rotations_total{identity=\"client\",result=\"success\"} 3",
            "pintle_rotations_total{identity=\"client\",result=\"failure\"} 2",
            "pintle_proxy_connections{identity=\"client\",certificate=\"current\"} 5",
            "pintle_proxy_connections{identity=\"client\",certificate=\"earlier\"} 2",
            "pintle_proxy_accepted_total{identity=\"client\"} 0",
            "pintle_proxy_handshakes_total{identity=\"client\",side=\"server\"} 0",
            "pintle_proxy_bytes_total{identity=\"client\",to=\"client\"} 0",
            "pintle_proxy_failures_total{identity=\"client\",reason=\"cut-at-end\"} 1",
            "pintle_backend_up{backend=\"token\"} 0",
        ] {
            assert!(text.lines().any(|there| there == line), "{line} in {text}");
        }
        assert!(!text.contains("A1") && !text.contains("B2"), "no serial numbers: {text}");
        let names: std::collections::BTreeSet<_> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split([' ', '{']).next())
            .collect();
        let documentation = include_str!("../../docs/operators.md");
        for name in names {
            assert!(documentation.contains(&format!("`{name}`")), "{name} is not in docs/operators.md");
        }
    }

    /// Prometheus rejects a scrape that has the same series twice.
    #[test]
    fn several_identities_have_series_of_their_own() {
        let mut status = status();
        let (second, end) = (&status.identities[0], Some(UnixTime::from_seconds(60)));
        let second = IdentityStatus { identity: "probe".to_owned(), not_after: end, errors: 5, ..second.clone() };
        status.identities.push(second);
        let text = text(&status, UnixTime::from_seconds(50));
        let mut series: Vec<_> =
            text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' ')).collect();
        series.sort_unstable();
        assert!(series.windows(2).all(|pair| pair[0].0 != pair[1].0), "{text}");
        for line in [
            "kubelet_certificate_manager_client_ttl_seconds 10",
            "kubelet_certificate_manager_client_expiration_renew_errors 7",
            "pintle_certificate_not_after_timestamp_seconds{identity=\"client\"} 100",
            "pintle_certificate_not_after_timestamp_seconds{identity=\"probe\"} 60",
        ] {
            assert!(text.lines().any(|there| there == line), "{line} in {text}");
        }
    }

    #[test]
    fn there_is_no_expiration_before_the_first_certificate() {
        let identity = IdentityStatus { identity: "client".to_owned(), ..IdentityStatus::default() };
        let text = text(&Status { identities: vec![identity], backends: Vec::new() }, UnixTime::from_seconds(0));
        assert!(
            !text.contains("ttl_seconds") && text.contains("pintle_certificate_ready_status{identity=\"client\"} 0")
        );
    }
}
