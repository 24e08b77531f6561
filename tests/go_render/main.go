// Renders chats with Go's text/template as Ollama does: JSON requests on stdin, JSON texts on stdout.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type call struct {
	Function struct {
		Name      string
		Arguments map[string]any
	}
}

type message struct {
	Role, Content string
	ToolCalls     []call `json:"tool_calls"`
}

type request struct {
	Template string
	Messages []message
	Tools    any
}

func main() {
	var requests []request
	if err := json.NewDecoder(os.Stdin).Decode(&requests); err != nil {
		panic(err)
	}
	functions := template.FuncMap{"json": func(value any) string {
		text, _ := json.Marshal(value)
		return string(text)
	}}
	texts := []string{}
	for _, one := range requests {
		var system []string
		for _, message := range one.Messages {
			if message.Role == "system" {
				system = append(system, message.Content)
			}
		}
		parsed := template.Must(template.New("").Option("missingkey=zero").Funcs(functions).Parse(one.Template))
		var text strings.Builder
		data := map[string]any{"Messages": one.Messages, "System": strings.Join(system, "\n\n"), "Tools": one.Tools}
		if err := parsed.Execute(&text, data); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
