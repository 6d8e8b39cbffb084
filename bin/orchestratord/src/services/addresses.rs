//! Where a node may say that it is: this process connects there, with its token.

use std::net::{IpAddr, Ipv6Addr};

use axum::http::Uri;
use ipnet::IpNet;

/// Why an entry of the list of places is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlaceError {
    #[error("{0:?} is no network")]
    Network(String),
    #[error("{0:?} is no network, address, name or *.suffix")]
    Host(String),
}

/// Why an address of a node is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AddressError {
    #[error("must be http://host:port or https://host:port")]
    Form,
    #[error("must be https://: this control plane calls nodes by TLS only")]
    PlainHttp,
    #[error("{0} is no address of a node")]
    NeverANode(String),
    #[error("{0} is not among ORCHESTRATORD_NODE_ADDRESSES")]
    NotAllowed(String),
}

/// Longest address, bytes.
const LONGEST: usize = 300;

/// Which addresses are taken.
#[derive(Debug, Clone, Default)]
pub(crate) struct NodeAddresses {
    /// Empty: any that is not forbidden altogether.
    allowed: Vec<AllowedHost>,
    tls_only: bool,
}

#[derive(Debug, Clone)]
enum AllowedHost {
    Network(IpNet),
    Name(String),
    /// With its dot.
    Suffix(String),
}

impl NodeAddresses {
    /// A comma-separated list of networks, addresses, names and `*.suffix`es.
    pub(crate) fn parse(list: &str, tls_only: bool) -> Result<Self, PlaceError> {
        let entry = |text: &str| -> Result<AllowedHost, PlaceError> {
            if let Ok(ip) = text.parse::<IpAddr>() {
                return Ok(AllowedHost::Network(ip.into()));
            }
            if text.contains('/') {
                let network = text.parse().map_err(|_| PlaceError::Network(text.to_owned()))?;
                return Ok(AllowedHost::Network(network));
            }
            let name = text.to_ascii_lowercase();
            let (suffix, labels) = match name.strip_prefix('*') {
                Some(suffix) => (true, suffix.strip_prefix('.').unwrap_or("")),
                None => (false, name.as_str()),
            };
            if labels.is_empty() || !labels.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
            {
                return Err(PlaceError::Host(text.to_owned()));
            }
            Ok(if suffix { AllowedHost::Suffix(format!(".{labels}")) } else { AllowedHost::Name(name) })
        };
        let parts = list.split(',').map(str::trim).filter(|text| !text.is_empty());
        Ok(Self { allowed: parts.map(entry).collect::<Result<_, _>>()?, tls_only })
    }

    /// Checks `http://host:port` or `https://host:port`.
    pub(crate) fn check(&self, address: &str) -> Result<(), AddressError> {
        let short = Some(address).filter(|text| text.len() <= LONGEST).ok_or(AddressError::Form)?;
        let uri: Uri = short.parse().map_err(|_| AddressError::Form)?;
        let (scheme, authority) = uri.scheme_str().zip(uri.authority()).ok_or(AddressError::Form)?;
        let bare = address == format!("{scheme}://{authority}") && !authority.as_str().contains('@');
        if !bare || !["http", "https"].contains(&scheme) || authority.host().is_empty() {
            return Err(AddressError::Form);
        }
        if authority.as_str() != authority.host() && authority.port_u16().is_none_or(|port| port == 0) {
            return Err(AddressError::Form);
        }
        if self.tls_only && scheme == "http" {
            return Err(AddressError::PlainHttp);
        }
        let host = authority.host().trim_matches(['[', ']']).to_ascii_lowercase();
        let ip = host.parse::<IpAddr>().ok().map(|ip| ip.to_canonical());
        if authority.host().starts_with('[') && ip.is_none() {
            return Err(AddressError::Form);
        }
        // Resolvers take 2852039166, 0xa9fea9fe and 169.254.43518 for addresses too.
        let last = host.rsplit('.').next().unwrap_or_default();
        let is_number = last.bytes().all(|b| b.is_ascii_digit()) || last.starts_with("0x");
        if ip.is_none() && is_number {
            return Err(AddressError::Form);
        }
        if ip.is_some_and(is_never_a_node) || (ip.is_none() && host.contains("metadata")) {
            return Err(AddressError::NeverANode(host));
        }
        let is_allowed = |entry: &AllowedHost| match (entry, ip) {
            (AllowedHost::Network(network), Some(ip)) => network.contains(&ip),
            (AllowedHost::Name(name), None) => *name == host,
            (AllowedHost::Suffix(suffix), None) => host.ends_with(suffix.as_str()),
            _ => false,
        };
        if !self.allowed.is_empty() && !self.allowed.iter().any(is_allowed) {
            return Err(AddressError::NotAllowed(host));
        }
        Ok(())
    }
}

/// Addresses of no host, of every host, and of a cloud's own services.
fn is_never_a_node(ip: IpAddr) -> bool {
    const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x0254);
    let special = match ip {
        // 100.100.100.200 and 192.0.0.192 are metadata services of clouds.
        IpAddr::V4(ip) => {
            ip.is_link_local()
                || ip.is_broadcast()
                || [[100, 100, 100, 200], [192, 0, 0, 192]].contains(&ip.octets())
        }
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip == METADATA_V6,
    };
    special || ip.is_unspecified() || ip.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-1122
    #[test]
    fn only_a_plain_url_of_a_host_that_can_be_a_node_is_taken() {
        let any = NodeAddresses::default();
        for good in [
            "http://10.0.0.5:9200",
            "https://gpu-1.example:9200",
            "http://[::1]:9200",
            "http://127.0.0.1:1",
            "http://gpu-1",
        ] {
            assert_eq!(any.check(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "gpu-1:9200",
            "ftp://gpu-1",
            "http://",
            "http://user:pass@gpu-1:9200",
            "http://gpu-1:9200/",
            "http://gpu-1/x",
            "http://gpu-1?x",
            "http://gpu-1#x",
            "http://169.254.169.254",
            "http://[fe80::1]:1",
            "http://0.0.0.0:9200",
            "http://[::ffff:169.254.169.254]",
            "http://metadata.google.internal",
            "http://224.0.0.1",
            "http://gpu-1:0",
            "http://gpu-1:",
            "http://100.100.100.200",
            "http://[fd00:ec2::254]",
            "http://gpu 1",
            "http://[gpu-1]:9200",
            "http://2852039166",
            "http://0xa9fea9fe",
            "http://169.254.43518",
            "http://0251.0376.0251.0376",
            "http://169.254.169.254.",
        ] {
            assert!(any.check(bad).is_err(), "{bad}");
        }
        assert!(any.check(&format!("http://{}", "a".repeat(400))).is_err());
    }

    // CLOUD-1123
    #[test]
    fn a_list_of_places_shuts_everything_else_out() {
        let some =
            NodeAddresses::parse("10.1.0.0/16, fd00::/8, 192.168.7.7, gpu-1.example, *.pool.example", false)
                .unwrap();
        for good in [
            "http://10.1.2.3:1",
            "http://[fd00::9]:1",
            "http://192.168.7.7",
            "http://GPU-1.example",
            "http://a.b.pool.example:5",
            "http://[::ffff:10.1.2.3]:1",
        ] {
            assert_eq!(some.check(good), Ok(()), "{good}");
        }
        for bad in [
            "http://10.2.0.1",
            "http://192.168.7.8",
            "http://pool.example",
            "http://evilpool.example",
            "http://127.0.0.1",
        ] {
            let error = some.check(bad).unwrap_err();
            assert!(error.to_string().contains("ORCHESTRATORD_NODE_ADDRESSES"), "{bad}: {error}");
        }
        for bad in ["10.0.0.0/99", "*", "a b", "http://x"] {
            assert!(NodeAddresses::parse(bad, false).is_err(), "{bad}");
        }
        let tls = NodeAddresses::parse("", true).unwrap();
        assert!(tls.check("https://10.0.0.5:9200").is_ok() && tls.check("http://10.0.0.5:9200").is_err());
    }
}
