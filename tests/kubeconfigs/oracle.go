// Command oracle prints the results of Go's standard library, one line of output per line of input:
//
//	oracle proxy   URLs in; scheme, host, port and user of the proxy that the environment names, or "-"
//	oracle pem     texts in hexadecimal in; LABEL=CONTENT of each PEM block, both in hexadecimal
package main

import (
	"bufio"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"strings"
)

func main() {
	answers := map[string]func(string) string{"proxy": proxy, "pem": blocks}
	answer := answers[os.Args[1]]
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		fmt.Println(answer(lines.Text()))
	}
}

var ports = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}

func proxy(server string) string {
	request, err := http.NewRequest("GET", server, nil)
	if err != nil {
		return err.Error()
	}
	chosen, err := http.ProxyFromEnvironment(request)
	if err != nil || chosen == nil {
		return "-"
	}
	host, port := chosen.Hostname(), chosen.Port()
	if host == "" {
		return "-"
	}
	if port == "" {
		port = ports[chosen.Scheme]
	}
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	user := ""
	if chosen.User != nil {
		password, _ := chosen.User.Password()
		user = chosen.User.Username() + ":" + password
	}
	return strings.Join([]string{chosen.Scheme, host, port, user}, " ")
}

func blocks(text string) string {
	rest, err := hex.DecodeString(text)
	if err != nil {
		return err.Error()
	}
	var found []string
	for {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			return strings.Join(found, " ")
		}
		found = append(found, hex.EncodeToString([]byte(block.Type))+"="+hex.EncodeToString(block.Bytes))
	}
}
